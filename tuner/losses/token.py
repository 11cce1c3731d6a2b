"""The loss of language modelling: summed weighted cross entropy of the learned tokens, without full logits.

Shapes: N learned tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**25
"""Logits held at a time, C · V: 128 MiB of fp32."""

PRODUCT_ROWS = 2**13
"""Rows of the head's gradient that are added at a time where they are computed in bf16."""


def cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_n weights_n · −log softmax(W h_n + b)[target_n], as a scalar in fp32; differentiable in h, W and b.

    Gradients are computed chunk by chunk in the forward pass, while the chunk's logits exist, so neither
    pass holds more than CHUNK_ELEMENTS logits. Products are in the dtype of `hidden_ND`, or of autocast where
    it is on; the softmax is in fp32.
    """
    hidden_ND = for_products(hidden_ND)
    if not torch.is_grad_enabled():  # a function is told that its inputs need gradients even so
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

    def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = head(hidden).float()
        return (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()

    size = chunk_size(vocabulary)
    losses = [
        checkpoint(chunk_loss, *chunk, use_reentrant=False)
        for chunk in zip(hidden_ND.split(size), targets_N.split(size), weights_N.split(size), strict=True)
    ]
    return torch.stack(losses).sum()


def for_products(hidden_ND: torch.Tensor) -> torch.Tensor:
    """In the dtype that products are computed in: autocast, where it is on, leaves those into given memory alone."""
    device = hidden_ND.device.type
    if not torch.is_autocast_enabled(device):
        return hidden_ND
    return hidden_ND.to(torch.get_autocast_dtype(device))


def chunk_size(vocabulary: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(1, CHUNK_ELEMENTS // vocabulary)


class _ChunkedCrossEntropy(torch.autograd.Function):
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
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias_V = (
            torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias and bias_V is not None else None
        )
        size = max(1, min(chunk_size(len(matrix_VD)), len(hidden_ND)))
        # Held once for all chunks: fresh memory of this size costs as much time as the softmax.
        product_CV = hidden_ND.new_empty(size, len(matrix_VD))
        in_fp32 = product_CV.dtype == torch.float32
        logits_CV = product_CV if in_fp32 else torch.empty_like(product_CV, dtype=torch.float32)
        for start in range(0, len(hidden_ND), size):
            rows = slice(start, start + size)
            target_C1, weights_C1 = targets_N[rows, None], weights_N[rows, None]
            product_CV, logits_CV = product_CV[: len(target_C1)], logits_CV[: len(target_C1)]
            torch.mm(hidden_ND[rows], matrix_VD.T, out=product_CV)
            logits_CV.copy_(product_CV)
            if bias_V is not None:
                logits_CV += bias_V
            logits_CV -= logits_CV.amax(-1, keepdim=True)
            target_logits_C1 = logits_CV.gather(-1, target_C1)
            normaliser_C1 = logits_CV.exp_().sum(-1, keepdim=True)
            loss += ((normaliser_C1.log() - target_logits_C1) * weights_C1).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad_CV = logits_CV.mul_(weights_C1 / normaliser_C1)  # weight · (softmax − one-hot)
            grad_CV.scatter_add_(-1, target_C1, -weights_C1)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = product_CV.copy_(grad_CV)
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


def add_product(sum_VD: torch.Tensor, left_VC: torch.Tensor, right_CD: torch.Tensor) -> None:
    """sum += left · right, never holding a product as large as the head."""
    if sum_VD.dtype == left_VC.dtype:
        sum_VD.addmm_(left_VC, right_CD)
        return
    for start in range(0, len(sum_VD), PRODUCT_ROWS):
        rows = slice(start, start + PRODUCT_ROWS)
        sum_VD[rows] += left_VC[rows] @ right_CD
