"""Logits and softmax of a large vocabulary, a chunk of tokens at a time, in memory that is allocated once.

What `token.py` (cross entropy) and `logprob.py` (log-probabilities) share. Their autograd functions stay two: cross
entropy knows each token's weight in the forward pass, so it sums the head's gradient while a chunk's logits exist; a
log-probability's gradient arrives only in the backward pass, where a trained head costs the products once more.
Cross entropy also weights its gradient in the pass that normalizes it; `Chunk.logprobs` in its place was no faster
(measured), and rounds differently from the recorded losses of `tests/golden`.

Shapes: N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

# torch annotates some of its functions only in part
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

CHUNK_ELEMENTS = 2**25
"""Logits held at a time, C · V: 128 MiB of fp32."""

PRODUCT_ROWS = 2**13
"""Rows of the head's gradient that are added at a time where they are computed in bf16."""


def chunk_size(vocabulary: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(1, CHUNK_ELEMENTS // vocabulary)


def recomputed(function: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
    """The function's result; its intermediate values are not kept, but computed again in the backward pass."""
    # Reentrant checkpoints give no gradient to what the function closes over, such as a head, unless one
    # of the arguments needs a gradient too.
    return checkpoint(function, *arguments, use_reentrant=False)


def in_product_dtype(hidden_ND: torch.Tensor) -> torch.Tensor:
    """Cast to the dtype of products: autocast, where it is on, does not cast those written with `out=`."""
    device = hidden_ND.device.type
    if not torch.is_autocast_enabled(device):
        return hidden_ND
    return hidden_ND.to(torch.get_autocast_dtype(device))


@dataclass(frozen=True)
class Chunk:
    """Logits, then probabilities, of the tokens in `rows`; the next chunk overwrites them."""

    rows: slice
    logits_CV: torch.Tensor
    """Divided by the temperature, in fp32; in the dtype of products where there is no bias and no temperature."""
    probabilities_CV: torch.Tensor
    """In fp32, once `normalize` has run; may share the memory of the logits, which are then overwritten."""
    products_CV: torch.Tensor
    """Memory in the dtype of products; may be that of the logits."""

    def logits_in_fp32(self) -> torch.Tensor:
        """The logits, [C, V], in the memory of the probabilities, which the caller may compute in."""
        if self.logits_CV.data_ptr() == self.probabilities_CV.data_ptr():
            return self.probabilities_CV
        return self.probabilities_CV.copy_(self.logits_CV)

    def logprobs(self, targets_C1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the targets, and logsumexp of the logits, fp32 [C, 1] each; normalizes the chunk."""
        largest_C1 = self.logits_CV.amax(-1, keepdim=True).float()
        target_logits_C1 = self.logits_CV.gather(-1, targets_C1).float()
        self.normalize()
        # The largest probability is 1 / sum exp(logit − largest): logsumexp without its two more passes over V.
        # It is at least 1 / V, so its logarithm keeps all digits.
        rest_C1 = -self.probabilities_CV.amax(-1, keepdim=True).log()
        return target_logits_C1 - largest_C1 - rest_C1, largest_C1 + rest_C1

    def normalize(self) -> None:
        """Compute the probabilities from the logits.

        Always by the same kernel, or the ratio of two passes over equal weights would not be exactly 1. softmax
        reads a row to its end before it writes it, so it may write into the memory that it reads.
        """
        torch.softmax(self.logits_CV, -1, dtype=torch.float32, out=self.probabilities_CV)

    def entropies(self, logsumexp_C1: torch.Tensor) -> torch.Tensor:
        """Entropies in nats, fp32 [C], of a normalized chunk made with keep_logits; overwrites fp32 logits."""
        return -self.logits_CV.float().sub_(logsumexp_C1).mul_(self.probabilities_CV).sum(-1)

    def residuals(self, targets_C1: torch.Tensor, logprobs_C1: torch.Tensor) -> torch.Tensor:
        """softmax − one-hot of the targets, fp32 [C, V]: the gradient of −logprob by the logits.

        Written over the probabilities of a normalized chunk.
        """
        # p − 1 from log p: near p = 1 the subtraction would leave few digits.
        return self.probabilities_CV.scatter_(-1, targets_C1, torch.expm1(logprobs_C1))

    def for_products(self, grad_CV: torch.Tensor) -> torch.Tensor:
        """A gradient by the logits in the dtype of products; overwrites the products."""
        in_fp32 = self.products_CV.dtype == torch.float32
        return grad_CV if in_fp32 else self.products_CV.copy_(grad_CV)


def chunks(
    hidden_ND: torch.Tensor,
    matrix_VD: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    *,
    keep_logits: bool = False,
) -> Iterator[Chunk]:
    """Chunks of (W h + b) / temperature, in order; matrix_VD: W, in the dtype of `hidden_ND`.

    keep_logits: hold the logits beside the probabilities, as entropies need them. Each chunk is valid until the
    next one is asked for.
    """
    vocabulary = len(matrix_VD)
    size = max(1, min(chunk_size(vocabulary), len(hidden_ND)))
    # Allocated once for all chunks: fresh memory of this size costs as much time as the softmax.
    products_NV = hidden_ND.new_empty(size, vocabulary)
    probabilities_NV = logits_NV = products_NV
    in_fp32 = products_NV.dtype == torch.float32
    if keep_logits or not in_fp32:
        probabilities_NV = torch.empty_like(products_NV, dtype=torch.float32)
    if not in_fp32 and (bias_V is not None or temperature != 1):
        logits_NV = torch.empty_like(probabilities_NV) if keep_logits else probabilities_NV
    for start in range(0, len(hidden_ND), size):
        rows = slice(start, min(start + size, len(hidden_ND)))
        products_CV, probabilities_CV, logits_CV = (
            memory[: rows.stop - start] for memory in (products_NV, probabilities_NV, logits_NV)
        )
        torch.mm(hidden_ND[rows], matrix_VD.T, out=products_CV)
        if logits_NV is not products_NV:
            logits_CV.copy_(products_CV)
        if bias_V is not None:
            logits_CV += bias_V
        if temperature != 1:
            logits_CV /= temperature
        yield Chunk(rows, logits_CV, probabilities_CV, products_CV)


def add_product(sum_VD: torch.Tensor, left_VC: torch.Tensor, right_CD: torch.Tensor) -> None:
    """sum += left · right, never holding a product as large as the head."""
    if sum_VD.dtype == left_VC.dtype:
        sum_VD.addmm_(left_VC, right_CD)
        return
    for start in range(0, len(sum_VD), PRODUCT_ROWS):
        rows = slice(start, start + PRODUCT_ROWS)
        sum_VD[rows] += left_VC[rows] @ right_CD
