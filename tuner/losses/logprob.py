"""Log-probabilities of tokens, without full logits, and differentiable with a gradient of each token's own.

Shapes: N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tuner.losses.token import add_product, chunk_size, for_products


def logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log softmax((W h_n + b) / temperature)[target_n] in fp32 [N], differentiable in h, W and b.

    Second, where `entropy` asks for them: the entropies of the same distributions, in nats, fp32 [N], not
    differentiable; else None. temperature: above 0.

    Never holds more than CHUNK_ELEMENTS logits (`losses/token.py`). The gradient of the hidden states is prepared
    while the logits exist, as [N, D]; that of a trained head hangs on all tokens' gradients, so it needs the
    probabilities in the backward pass: kept where they are one chunk, else computed again chunk by chunk.
    Products are in the dtype of `hidden_ND`, or of autocast where it is on; the softmax is in fp32.
    """
    hidden_ND = for_products(hidden_ND)
    if not torch.is_grad_enabled():  # a function is told that its inputs need gradients even so
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

    def of_chunk(
        hidden_CD: torch.Tensor, targets_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        all_CV = (head(hidden_CD).float() / temperature).log_softmax(-1)
        own_C = all_CV.gather(-1, targets_C[:, None])[:, 0]
        return own_C, _entropies(all_CV.detach()) if entropy else None

    size = chunk_size(vocabulary)
    chunks = list(zip(hidden_ND.split(size), targets_N.split(size), strict=True))
    if len(chunks) == 1:
        return of_chunk(*chunks[0])
    found = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    own, entropies = zip(*found, strict=True)
    return torch.cat(own), torch.cat(entropies) if entropy else None


def _entropies(logprobs_CV: torch.Tensor) -> torch.Tensor:
    return -(logprobs_CV.exp() * logprobs_CV).sum(-1)


class _ChunkedLogprobs(torch.autograd.Function):
    """With slopes = softmax − one-hot of a token, its log-probability's gradient by its logits is −slopes / T."""

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
        slopes_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        slopes_CV = None
        for rows, chunk in _chunks(hidden_ND, matrix_VD, bias_V, temperature, keep_logits=entropy):
            logprobs_C1, normaliser_C1 = chunk.logprobs(targets_N[rows, None])
            logprobs_N[rows] = logprobs_C1[:, 0]
            if entropies_N is not None:
                entropies_N[rows] = chunk.entropies(normaliser_C1)
            if needs_hidden or needs_head:
                slopes_CV = chunk.slopes(targets_N[rows, None], logprobs_C1)
            if slopes_hidden_ND is not None and slopes_CV is not None:
                torch.mm(slopes_CV, matrix_VD, out=slopes_hidden_ND[rows])
        kept = slopes_CV if needs_head and len(hidden_ND) <= chunk_size(len(weight_VD)) else None
        inputs = (hidden_ND, weight_VD, targets_N, bias_V) if needs_head else (None,) * 4
        ctx.save_for_backward(*inputs, logprobs_N if needs_head else None, slopes_hidden_ND, kept)
        ctx.temperature = temperature
        if entropies_N is not None:
            ctx.mark_non_differentiable(entropies_N)
        return logprobs_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        *_, slopes_hidden_ND, _ = ctx.saved_tensors
        scales_N1 = upstream[0][:, None] / -ctx.temperature
        grad_hidden_ND = None
        if slopes_hidden_ND is not None:
            grad_hidden_ND = (slopes_hidden_ND * scales_N1).to(slopes_hidden_ND.dtype)
        grad_weight_VD, grad_bias_V = _head_gradients(ctx, scales_N1)
        return grad_hidden_ND, grad_weight_VD, None, grad_bias_V, None, None


def _head_gradients(ctx: Any, scales_N1: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """sum_n scale_n · slopes_n ⊗ h_n, and sum_n scale_n · slopes_n; None for what is frozen."""
    _, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    if not (needs_weight or needs_bias):
        return None, None
    hidden_ND, weight_VD, _, bias_V, *_ = ctx.saved_tensors
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
    grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias else None
    for rows, slopes_CV in _slopes_again(ctx):
        if grad_weight_VD is not None:  # the scales go to the side that is D wide, not V
            scaled_CD = (hidden_ND[rows] * scales_N1[rows]).to(hidden_ND.dtype)
            add_product(grad_weight_VD, slopes_CV.T, scaled_CD)
        if grad_bias_V is not None:
            grad_bias_V += (slopes_CV * scales_N1[rows]).sum(0)
    return (
        None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
        None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
    )


def _slopes_again(ctx: Any) -> Iterator[tuple[slice, torch.Tensor]]:
    """The forward pass's slopes by chunk: kept, or computed once more."""
    hidden_ND, weight_VD, targets_N, bias_V, logprobs_N, _, kept_NV = ctx.saved_tensors
    if kept_NV is not None:
        yield slice(None), kept_NV
        return
    matrix_VD = weight_VD.to(hidden_ND.dtype)
    for rows, chunk in _chunks(hidden_ND, matrix_VD, bias_V, ctx.temperature):
        chunk.normalise()
        yield rows, chunk.slopes(targets_N[rows, None], logprobs_N[rows, None])


@dataclass(frozen=True)
class _Chunk:
    """Logits and probabilities of some tokens, in memory that the next chunk takes over."""

    logits_CV: torch.Tensor
    """Over the temperature, in fp32, or as they were multiplied out where nothing is done to them."""
    probabilities_CV: torch.Tensor
    """In fp32, once normalised; perhaps in the memory of the logits, which are then no more."""
    products_CV: torch.Tensor
    """Memory in the products' dtype; perhaps that of the logits."""

    def logprobs(self, targets_C1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the targets, and log of the sum of the exponentials of all logits, [C, 1] each."""
        largest_C1 = self.logits_CV.amax(-1, keepdim=True).float()
        own_C1 = self.logits_CV.gather(-1, targets_C1).float()
        self.normalise()
        # What logsumexp would spend two more passes on; at least 1 / V, so its logarithm has all digits.
        rest_C1 = -self.probabilities_CV.amax(-1, keepdim=True).log()
        return own_C1 - largest_C1 - rest_C1, largest_C1 + rest_C1

    def normalise(self) -> None:
        """Make the probabilities: the same ones wherever they are written, or a ratio of two passes would not be 1.

        softmax reads a row to its end before it writes it, so that it may write into what it reads.
        """
        torch.softmax(self.logits_CV, -1, dtype=torch.float32, out=self.probabilities_CV)

    def entropies(self, normalisers_C1: torch.Tensor) -> torch.Tensor:
        """Entropies, [C]; where logits are in fp32, this is the end of them."""
        return -self.logits_CV.float().sub_(normalisers_C1).mul_(self.probabilities_CV).sum(-1)

    def slopes(self, targets_C1: torch.Tensor, logprobs_C1: torch.Tensor) -> torch.Tensor:
        """softmax − one-hot, in the products' dtype; the end of everything else."""
        # p − 1 from log p: near 1, where a subtraction would leave few digits
        slopes_CV = self.probabilities_CV.scatter_(-1, targets_C1, torch.expm1(logprobs_C1))
        in_fp32 = self.products_CV.dtype == torch.float32
        return slopes_CV if in_fp32 else self.products_CV.copy_(slopes_CV)


def _chunks(
    hidden_ND: torch.Tensor,
    matrix_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    *,
    keep_logits: bool = False,
) -> Iterator[tuple[slice, _Chunk]]:
    """keep_logits: beside the probabilities, for entropies; else those in fp32 become the probabilities."""
    vocabulary = len(matrix_VD)
    size = max(1, min(chunk_size(vocabulary), len(hidden_ND)))
    products_CV = hidden_ND.new_empty(size, vocabulary)
    apart = keep_logits or products_CV.dtype != torch.float32
    probabilities_CV = torch.empty_like(products_CV, dtype=torch.float32) if apart else products_CV
    for start in range(0, len(hidden_ND), size):
        rows = slice(start, min(start + size, len(hidden_ND)))
        products_CV, probabilities_CV = (
            memory[: rows.stop - start] for memory in (products_CV, probabilities_CV)
        )
        logits_CV = torch.mm(hidden_ND[rows], matrix_VD.T, out=products_CV)
        if bias_V is not None or temperature != 1:
            logits_CV = logits_CV.float()
        if bias_V is not None:
            logits_CV += bias_V
        if temperature != 1:
            logits_CV /= temperature
        yield rows, _Chunk(logits_CV, probabilities_CV, products_CV)
