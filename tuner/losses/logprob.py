"""Log-probabilities of tokens without full logits, differentiable token by token.

Shapes: N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

# torch annotates some of its functions only in part
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tuner.losses.chunked_softmax import add_product, chunk_size, chunks, in_product_dtype, recomputed


def logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log softmax((W h_n + b) / temperature)[target_n] in fp32 [N], differentiable in h, W and b.

    With `entropy`, second, the entropies of the same distributions in nats, fp32 [N], not differentiable; else
    None. temperature: above 0.

    Never holds more than CHUNK_ELEMENTS logits (`chunked_softmax.py`). The gradient of the hidden states is prepared
    while the logits exist, as [N, D]; that of a trained head depends on all tokens' gradients, so it needs the
    probabilities in the backward pass: saved where they are one chunk, else computed again chunk by chunk.
    Products are in the dtype of `hidden_ND`, or of autocast where it is on; the softmax is in fp32.
    """
    hidden_ND = in_product_dtype(hidden_ND)
    if not torch.is_grad_enabled():  # needs_input_grad is True of leaves even under no_grad
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    return _ChunkedLogprobs.apply(hidden_ND, weight_VD, targets_N, bias_V, temperature, entropy)


def logprobs_of_head(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    vocabulary: int,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same for a head that is more than one matrix (an adapter, soft caps); chunks are recomputed."""

    def chunk_results(
        hidden_CD: torch.Tensor, targets_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logprobs_CV = (head(hidden_CD).float() / temperature).log_softmax(-1)
        logprobs_C = logprobs_CV.gather(-1, targets_C[:, None])[:, 0]
        return logprobs_C, _entropies(logprobs_CV.detach()) if entropy else None

    size = chunk_size(vocabulary)
    inputs = list(zip(torch.split(hidden_ND, size), torch.split(targets_N, size), strict=True))
    if len(inputs) == 1:  # nothing to save by recomputing it
        return chunk_results(*inputs[0])
    outputs = [recomputed(chunk_results, *chunk) for chunk in inputs]
    entropies = [entropies_C for _, entropies_C in outputs if entropies_C is not None]
    return torch.cat([logprobs_C for logprobs_C, _ in outputs]), torch.cat(entropies) if entropy else None


def entropies_of_head(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_ND: torch.Tensor,
    vocabulary: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Entropy in nats of softmax(head(h_n) / temperature), fp32 [N], differentiable; chunks are recomputed.

    Apart from `logprobs`, which few callers need with it: the entropy's gradient is a second product with the head, and
    the log-probabilities stay those of the kernel that computed the old ones, to the last bit.
    """

    def chunk_entropies(hidden_CD: torch.Tensor) -> torch.Tensor:
        return _entropies((head(hidden_CD).float() / temperature).log_softmax(-1))

    chunks_CD = torch.split(hidden_ND, chunk_size(vocabulary))
    if len(chunks_CD) == 1:  # nothing to save by recomputing it
        return chunk_entropies(chunks_CD[0])
    return torch.cat([recomputed(chunk_entropies, hidden_CD) for hidden_CD in chunks_CD])


def _entropies(logprobs_CV: torch.Tensor) -> torch.Tensor:
    return -(logprobs_CV.exp() * logprobs_CV).sum(-1)


class _ChunkedLogprobs(torch.autograd.Function):
    """With residuals = softmax − one-hot of a token, the gradient of its logprob by W h + b is −residuals / T.

    Why it is not _ChunkedCrossEntropy: see `chunked_softmax.py`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        bias_V: torch.Tensor | None,
        temperature: float,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        needs_hidden, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        needs_head = needs_weight or needs_bias
        matrix_VD = weight_VD.to(hidden_ND.dtype)
        logprobs_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        entropies_N = torch.empty_like(logprobs_N) if entropy else None
        # residuals · W: the gradient by the hidden states, before each token's own upstream gradient scales it
        residual_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        residuals_CV = None
        for chunk in chunks(hidden_ND, matrix_VD, bias_V, temperature, keep_logits=entropy):
            rows, targets_C1 = chunk.rows, targets_N[chunk.rows, None]
            logprobs_C1, logsumexp_C1 = chunk.logprobs(targets_C1)
            logprobs_N[rows] = logprobs_C1[:, 0]
            if entropies_N is not None:
                entropies_N[rows] = chunk.entropies(logsumexp_C1)
            if needs_hidden or needs_head:
                residuals_CV = chunk.for_products(chunk.residuals(targets_C1, logprobs_C1))
            if residual_hidden_ND is not None and residuals_CV is not None:
                torch.mm(residuals_CV, matrix_VD, out=residual_hidden_ND[rows])
        saved = residuals_CV if needs_head and len(hidden_ND) <= chunk_size(len(weight_VD)) else None
        inputs = (hidden_ND, weight_VD, targets_N, bias_V) if needs_head else (None,) * 4
        ctx.save_for_backward(*inputs, logprobs_N if needs_head else None, residual_hidden_ND, saved)
        ctx.temperature = temperature
        if entropies_N is not None:
            ctx.mark_non_differentiable(entropies_N)
        return logprobs_N, entropies_N

    @staticmethod
    # The saved products are constants to autograd: a second derivative would be wrong, so it is an error.
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        *_, residual_hidden_ND, _ = ctx.saved_tensors
        scales_N1 = upstream[0][:, None] / -ctx.temperature
        grad_hidden_ND = None
        if residual_hidden_ND is not None:
            grad_hidden_ND = (residual_hidden_ND * scales_N1).to(residual_hidden_ND.dtype)
        grad_weight_VD, grad_bias_V = _head_gradients(ctx, scales_N1)
        return grad_hidden_ND, grad_weight_VD, None, grad_bias_V, None, None


def _head_gradients(ctx: Any, scales_N1: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """sum_n scale_n · residuals_n ⊗ h_n, and sum_n scale_n · residuals_n; None of a frozen weight or bias."""
    _, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    if not (needs_weight or needs_bias):
        return None, None
    hidden_ND, weight_VD, _, bias_V, *_ = ctx.saved_tensors
    # Summed in fp32: in bf16 the sum would swallow the small contributions of later chunks.
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
    grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias else None
    for rows, residuals_CV in _residuals_again(ctx):
        if grad_weight_VD is not None:  # the scales go to the side that is D wide, not V
            scaled_CD = (hidden_ND[rows] * scales_N1[rows]).to(hidden_ND.dtype)
            add_product(grad_weight_VD, residuals_CV.T, scaled_CD)
        if grad_bias_V is not None:
            grad_bias_V += (residuals_CV * scales_N1[rows]).sum(0)
    return (
        None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
        None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
    )


def _residuals_again(ctx: Any) -> Iterator[tuple[slice, torch.Tensor]]:
    """The residuals of the forward pass by chunk: saved, or computed once more."""
    hidden_ND, weight_VD, targets_N, bias_V, logprobs_N, _, saved_NV = ctx.saved_tensors
    if saved_NV is not None:
        yield slice(None), saved_NV
        return
    matrix_VD = weight_VD.to(hidden_ND.dtype)
    for chunk in chunks(hidden_ND, matrix_VD, bias_V, ctx.temperature):
        chunk.normalize()
        residuals_CV = chunk.residuals(targets_N[chunk.rows, None], logprobs_N[chunk.rows, None])
        yield chunk.rows, chunk.for_products(residuals_CV)
