"""The loss of language modeling: summed weighted cross entropy of the target tokens, without full logits.

Shapes: N target tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

# torch annotates some of its functions only in part
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tuner.losses.chunked_softmax import add_product, chunk_size, chunks, in_product_dtype, recomputed


def cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_n weights_n · −log softmax(W h_n + b)[target_n], as a scalar in fp32; differentiable in h, W and b.

    Gradients are computed chunk by chunk in the forward pass, while the chunk's logits exist, so neither
    pass holds more than CHUNK_ELEMENTS logits (`chunked_softmax.py`). Products are in the dtype of `hidden_ND`, or
    of autocast where it is on; the softmax is in fp32. Serves one backward pass; a second raises TypeError.
    """
    hidden_ND = in_product_dtype(hidden_ND)
    if not torch.is_grad_enabled():  # needs_input_grad is True of leaves even under no_grad
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, weights_N, bias_V)


def cross_entropy_of_head(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    vocabulary: int,
) -> torch.Tensor:
    """The same sum for a head that is more than one matrix (an adapter, soft caps), recomputed by chunk."""

    def chunk_loss(hidden_CD: torch.Tensor, targets_C: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
        logits_CV = head(hidden_CD).float()
        losses_C = torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="none")
        return (losses_C * weights_C).sum()

    size = chunk_size(vocabulary)
    parts = (torch.split(values, size) for values in (hidden_ND, targets_N, weights_N))
    losses = [recomputed(chunk_loss, *chunk) for chunk in zip(*parts, strict=True)]
    return torch.stack(losses).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in its forward pass. Why it is not _ChunkedLogprobs: see `chunked_softmax.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        bias_V: torch.Tensor | None,
    ) -> torch.Tensor:
        needs_hidden, needs_weight, _, _, needs_bias = ctx.needs_input_grad
        matrix_VD = weight_VD.to(hidden_ND.dtype)
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        # Summed in fp32: in bf16 the sum would swallow the small contributions of later chunks.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias_V = (
            torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias and bias_V is not None else None
        )
        for chunk in chunks(hidden_ND, matrix_VD, bias_V):
            rows = chunk.rows
            targets_C1, weights_C1 = targets_N[rows, None], weights_N[rows, None]
            logits_CV = chunk.logits_in_fp32()
            logits_CV -= logits_CV.amax(-1, keepdim=True)
            target_logits_C1 = logits_CV.gather(-1, targets_C1)
            normalizer_C1 = logits_CV.exp_().sum(-1, keepdim=True)
            loss += ((normalizer_C1.log() - target_logits_C1) * weights_C1).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad_CV = logits_CV.mul_(weights_C1 / normalizer_C1)  # weight · (softmax − one-hot)
            grad_CV.scatter_add_(-1, targets_C1, -weights_C1)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = chunk.for_products(grad_CV)
            if grad_hidden_ND is not None:
                torch.mm(grad_CV, matrix_VD, out=grad_hidden_ND[rows])
            if grad_weight_VD is not None:
                add_product(grad_weight_VD, grad_CV.T, hidden_ND[rows])
        ctx.gradients = grad_hidden_ND, grad_weight_VD, grad_bias_V
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = upstream
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so they serve one backward pass
        hidden, weight, bias = (None if grad is None else grad.mul_(scale) for grad in gradients)
        return hidden, None if weight is None else weight.to(ctx.weight_dtype), None, None, bias
