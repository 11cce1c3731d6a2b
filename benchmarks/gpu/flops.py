"""The floating-point operations that training cannot do without; a multiplication and an addition are two.

What is computed again (gradient checkpointing, attention's backward pass) does not count, nor do element-wise
operations. Per token: a frozen matrix of n weights takes 2n forward and 2n for its input's gradient; a trained one
another 2n for its own. The language head computes the tokens that the loss is taken on, and no others. Causal attention
has, for each token and each one that it sees (itself included), 2 products forward and 4 backward of all heads' sizes:
12 · heads · head size a layer, within each sample alone. (With adapters, the first layer's input needs no gradient:
its products are counted all the same, as by the figures that others publish.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tuner.data.batch import Batch
from tuner.models.load import Loaded
from tuner.models.unwrap import unwrapped


@dataclass(frozen=True)
class Matrices:
    """Numbers of weights that multiply every token, and the sizes that attention goes by."""

    frozen: int
    """In linear layers that are not trained, but for the head."""
    trained: int
    """In adapters, and in linear layers that are trained."""
    head: int
    head_is_trained: bool
    attention: int
    """Layers · heads · head size."""

    @classmethod
    def of(cls, loaded: Loaded) -> Matrices:
        """Count a model, also one on the meta device; 4-bit layers only there, where they are not packed yet."""
        model = unwrapped(loaded.model)
        head = model.get_output_embeddings() if hasattr(model, "lm_head") else None
        linear = [module for module in loaded.model.modules() if isinstance(module, nn.Linear)]
        weights = {id(module.weight): module.weight for module in linear if module is not head}
        shape = model.config
        head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        return cls(
            frozen=sum(weight.numel() for weight in weights.values() if not weight.requires_grad),
            trained=sum(weight.numel() for weight in weights.values() if weight.requires_grad),
            head=0 if head is None else head.weight.numel(),
            head_is_trained=head is not None and head.weight.requires_grad,
            attention=shape.num_hidden_layers * shape.num_attention_heads * head_dim,
        )


def training_flops(matrices: Matrices, lengths: Sequence[int], learned: int) -> float:
    """Operations of the forward and backward passes over samples of these lengths, `learned` tokens of them in the
    loss."""
    tokens = sum(lengths)
    visible = sum(length * (length + 1) // 2 for length in lengths)
    products = tokens * (4 * matrices.frozen + 6 * matrices.trained)
    head = learned * matrices.head * (6 if matrices.head_is_trained else 4)
    return float(products + head + 12 * matrices.attention * visible)


def batch_flops(matrices: Matrices, batches: Iterable[Batch]) -> float:
    """The same of packed rows."""
    return sum(
        training_flops(matrices, batch.offsets.diff().tolist(), len(batch.learned_N)) for batch in batches
    )
