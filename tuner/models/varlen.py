"""Attention for packed rows, registered with transformers as `varlen`; segments are given by their offsets.

Backends: on CUDA in bf16 flash-attn 2 if installed, else torch.nn.attention.varlen; in fp32, on older GPUs, for heads
that the kernels do not take and on CPU one call of scaled_dot_product_attention per segment. None of them materializes
T × T scores.
Shapes: T tokens of the row, H heads, K key/value heads, D head size (of values it may be another), S keys of a segment
of which queries are the last T.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from tuner.data.batch import Batch
from tuner.errors import UserError
from tuner.models.exchange import own_tokens, whole_segments
from tuner.models.kept_products import products

if TYPE_CHECKING:  # rows of one process do not load it
    from torch.distributed.device_mesh import DeviceMesh

NAME = "varlen"
CAPABILITY = (8, 0)
"""Compute capability from which GPUs have the kernels."""
LARGEST_HEAD = 256
"""Head size up to which flash kernels are compiled; they take multiples of 8, of queries, keys and values alike."""
QUERY_BLOCK = 1024
"""Queries of a block where attention takes a mask: the window is narrower than the segment, or keys come before."""
MASK_SIZE = 2**24
"""Most numbers of such a mask."""


def register() -> None:
    """Make `attn_implementation="varlen"` known to transformers, without a mask function.

    Offsets isolate the segments. Given a mask function, transformers would look for packed samples in the positions at
    every pass, which waits for the device.
    """
    AttentionInterface.register(NAME, varlen_attention)


@contextmanager
def attention(transformer: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another attention meanwhile. `varlen` ignores masks, so padded rows under it would be silently wrong."""
    register()
    previous = transformer.config._attn_implementation
    assert previous is not None  # set by every load
    transformer.set_attn_implementation(name)
    try:
        yield
    finally:
        transformer.set_attn_implementation(previous)


def check_attention(transformer: PreTrainedModel, folder: Path) -> None:
    """UserError for attention that packed rows cannot compute. transformers' models share the names."""
    for module in transformer.modules():
        for name, what in (("attn_logit_softcapping", "caps its scores"), ("sinks", "has sinks")):
            if getattr(module, name, None) is not None:
                raise UserError(
                    f"{folder}: the attention of {type(transformer).__name__} {what} ({name}), which attention over "
                    "packed rows does not; choose another model"
                )


def segment_arguments(batch: Batch) -> dict[str, Any]:
    """Keyword arguments of a transformers model's forward pass with which `varlen` isolates the batch's segments.

    Positions that restart isolate nothing: without these arguments tokens would attend to the segments before.
    """
    return {
        "cu_seq_lens_q": batch.offsets,
        "cu_seq_lens_k": batch.offsets,
        # numbers of the host: read off `offsets`, every layer would wait for the device
        "max_length_q": batch.longest,
        "max_length_k": batch.longest,
        # a tensor, of the host: numbers would be guards of torch.compile, which would compile every pack anew
        "segment_borders": torch.tensor(batch.borders),
    }


def varlen_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    segment_borders: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    row_processes: DeviceMesh | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of one packed row; returns ([1, T, H, D], None).

    With more keys than queries, these are the last tokens of the one segment that the keys are of.
    row_processes: those that compute the row together, each with its part of the tokens; segments are the whole row's.
    Raises ValueError when segments are missing, as attention would then silently cross samples or left padding, and
    for soft caps, sinks and attention dropout, which are not supported.
    """
    if segment_borders is None or cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(
            "varlen attention needs segments; use attention 'sdpa' for padded batches and caches"
        )
    if softcap is not None or s_aux is not None or dropout:
        raise ValueError("varlen attention has no soft cap, no sinks and no dropout")
    if torch.is_autocast_enabled(query_1HTD.device.type):  # full training: rotary embeddings are in fp32
        dtype = torch.get_autocast_dtype(query_1HTD.device.type)
        query_1HTD, key_1KTD, value_1KTD = (part.to(dtype) for part in (query_1HTD, key_1KTD, value_1KTD))
    if row_processes is not None:
        query_1HTD, key_1KTD, value_1KTD = (
            whole_segments(part, row_processes) for part in (query_1HTD, key_1KTD, value_1KTD)
        )
    if key_1KTD.shape[2] > query_1HTD.shape[2]:
        if len(segment_borders) != 2:
            raise ValueError("tokens behind others of their segment take a pass of their own")
        out_1HTD = _behind_others(query_1HTD, key_1KTD, value_1KTD, scaling, sliding_window)
        return out_1HTD.transpose(1, 2), None
    fits = fits_kernels(query_1HTD.shape[-1], value_1KTD.shape[-1])
    with products():
        # the flash kernels have no fp32
        if fits and query_1HTD.dtype != torch.float32 and has_kernels(query_1HTD.device):
            segments = (cu_seq_lens_q, max_length_q)
            out_1HTD = _by_kernel(query_1HTD, key_1KTD, value_1KTD, segments, scaling, sliding_window)
        else:
            out_1HTD = _by_borders(query_1HTD, key_1KTD, value_1KTD, segment_borders, scaling, sliding_window)
    if row_processes is not None:
        out_1HTD = own_tokens(out_1HTD, row_processes)
    return out_1HTD.transpose(1, 2), None


def _by_kernel(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    segments: tuple[torch.Tensor, int],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """segments: their offsets, as the kernels take them, and the longest one's length."""
    attend = _flash if _has_flash() else _torch_varlen
    query_THD, key_TKD, value_TKD = (part[0].transpose(0, 1) for part in (query_1HTD, key_1KTD, value_1KTD))
    out_THD = attend(query_THD, key_TKD, value_TKD, *segments, scaling, window)
    return out_THD[None].transpose(1, 2)


@torch.compiler.disable(reason="a call for each segment would be compiled for every pack")
def _by_borders(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    borders: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """borders: on the host, so that reading them does not wait for the device."""
    return _by_segment(query_1HTD, key_1KTD, value_1KTD, borders.diff().tolist(), scaling, window)


def _by_segment(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    lengths: list[int],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    groups = query_1HTD.shape[1] // key_1KTD.shape[1]
    if groups > 1:  # on CPU, shared heads take the slow path of scaled_dot_product_attention
        key_1KTD = key_1KTD.repeat_interleave(groups, dim=1)
        value_1KTD = value_1KTD.repeat_interleave(groups, dim=1)
    # split and cat: the backward pass of a slice would write the whole row once per segment
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query_1HTD, key_1KTD, value_1KTD)), strict=True)
    attend = functools.partial(_attend_segment, scaling=scaling, window=window)
    return torch.cat([attend(query, key, value) for query, key, value in parts], dim=2)


def _attend_segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    length = query.shape[2]
    if window is None or length <= window:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return torch.cat(
        [
            scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, first:end],
                value[:, :, first:end],
                attn_mask=visible,
                scale=scaling,
            )
            for start, end, first, visible in _masked_blocks(QUERY_BLOCK, length, 0, window, query.device)
        ],
        dim=2,
    )


def _behind_others(
    query_1HTD: torch.Tensor,
    key_1KSD: torch.Tensor,
    value_1KSD: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention of a segment's last tokens, whose keys stand behind those of the tokens before them."""
    (_, heads, length, _), key_heads, keys = query_1HTD.shape, key_1KSD.shape[1], key_1KSD.shape[2]
    # queries of the heads that share a key head are rows of one product: keys, which are many, are not repeated
    group, before = heads // key_heads, keys - length
    query_1KGTD, size = query_1HTD.unflatten(1, (key_heads, group)), MASK_SIZE // (keys * group)
    blocks = []
    for start, end, first, visible in _masked_blocks(size, length, before, window, query_1HTD.device):
        out = scaled_dot_product_attention(
            query_1KGTD[:, :, :, start:end].flatten(2, 3),
            key_1KSD[:, :, first : before + end],
            value_1KSD[:, :, first : before + end],
            attn_mask=visible.repeat(group, 1),
            scale=scaling,
        )
        blocks.append(out.unflatten(2, (group, end - start)))
    return torch.cat(blocks, dim=3).flatten(1, 2)


def _masked_blocks(
    size: int, length: int, before: int, window: int | None, device: torch.device
) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """Blocks of at most `size` queries that stand behind so many keys: (start, end, first key that is seen, mask)."""
    size = min(max(1, size), QUERY_BLOCK)
    for start in range(0, length, size):
        end = min(start + size, length)
        first = 0 if window is None else max(0, before + start - window + 1)
        distance = torch.arange(before + start, before + end, device=device)[:, None] - torch.arange(
            first, before + end, device=device
        )
        yield start, end, first, (distance >= 0) & (distance < (window or before + length))


@torch.compiler.assume_constant_result
def has_kernels(device: torch.device) -> bool:
    """Whether attention kernels for packed rows run here: on CUDA from compute capability 8.0 (Ampere) on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def fits_kernels(query_size: int, value_size: int) -> bool:
    """Whether the kernels take heads of these sizes. Multi-head latent attention (DeepSeek: 192 and 128) has others."""
    return query_size == value_size <= LARGEST_HEAD and query_size % 8 == 0


def head_sizes(transformer: PreTrainedModel) -> set[tuple[int, int]]:
    """(size of queries and keys, size of values) of the heads of a model's layers, by the names transformers shares."""
    sizes: set[tuple[int, int]] = set()
    for module in transformer.modules():
        # head_dim of latent attention is the part that rotates
        query = getattr(module, "qk_head_dim", getattr(module, "head_dim", None))
        if isinstance(query, int):
            sizes.add((query, getattr(module, "v_head_dim", query)))
    return sizes


def fallback_note(
    capability: tuple[int, int] | None, precision: str, sizes: Collection[tuple[int, int]] = ()
) -> list[str]:
    """A sentence where a GPU of this compute capability (None: no GPU) lacks the kernels that bf16 would use.

    sizes: of the model's heads; see `head_sizes`.
    """
    if capability is None or precision != "bf16":
        return []
    if capability >= CAPABILITY:
        others = [f"{query} and {value}" for query, value in sorted(sizes) if not fits_kernels(query, value)]
        return [
            f"the attention kernels for packed rows have no heads of sizes {heads} (queries and values): each sample "
            "takes a call of its own in these layers, which is exact and slower"
            for heads in others
        ]
    return [
        f"this GPU (compute capability {capability[0]}.{capability[1]}) is older than the attention kernels for packed "
        f"rows (from {CAPABILITY[0]}.{CAPABILITY[1]}): each sample takes a call of its own, which is exact and slower"
    ]


@functools.cache
def _flash_function() -> Any | None:
    """flash-attn 2's function, if installed: version 4 has a package of that name without it."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return flash_attn_varlen_func


@functools.cache
def _varlen_shares_heads() -> bool:
    """Whether torch's kernel takes fewer key heads than query heads; older releases do not."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


# torch.compile would look through a cache, and warn that it does
@torch.compiler.assume_constant_result
def _shares_heads() -> bool:
    return _varlen_shares_heads()


@torch.compiler.assume_constant_result
def _has_flash() -> bool:
    return _flash_function() is not None


def _flash(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    attend = _flash_function()
    assert attend is not None
    # transformers counts the token itself in its window, the kernels only those before it
    left = -1 if window is None else window - 1
    return attend(
        query_THD,
        key_TKD,
        value_TKD,
        offsets,
        offsets,
        longest,
        longest,
        softmax_scale=scaling,
        causal=True,
        window_size=(left, 0 if window is not None else -1),
        # its backward pass adds up by atomics unless told not to
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _torch_varlen(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query_THD.shape[1] // key_TKD.shape[1]
    shared: dict[str, Any] = {"enable_gqa": groups > 1}
    if not _shares_heads():
        key_TKD, value_TKD = (part.repeat_interleave(groups, dim=1) for part in (key_TKD, value_TKD))
        shared = {}
    left = -1 if window is None else window - 1
    return varlen_attn(  # pyright: ignore[reportReturnType] (a tuple only with return_aux)
        query_THD.contiguous(),
        key_TKD.contiguous(),
        value_TKD.contiguous(),
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        **shared,
    )
