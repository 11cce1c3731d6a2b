"""Branches that only a GPU takes, taken on a CPU: kernels emulated behind the signatures of the supported releases."""

from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as torch_varlen
from torch.nn.functional import scaled_dot_product_attention

import tuner
from tests.equivalence.conftest import SMALL
from tuner.config import override
from tuner.models import varlen

WINDOWS: list[tuple[int, int]] = []
"""The window of each emulated call."""


def attend(
    q: Any, k: Any, v: Any, offsets: Any, scale: float | None, window: tuple[int, int]
) -> torch.Tensor:
    """The kernels' contract: [tokens, heads, size], as many key heads, bf16; a window leaves the token itself out."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert q.shape == k.shape == v.shape
    assert all(part.is_contiguous() for part in (q, k, v))
    assert offsets.dtype == torch.int32
    WINDOWS.append(window)
    parts = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        visible = (distance >= 0) & ((distance <= window[0]) | (window[0] < 0))
        heads = [part[start:end].transpose(0, 1)[None] for part in (q, k, v)]
        parts.append(scaled_dot_product_attention(*heads, attn_mask=visible, scale=scale)[0].transpose(0, 1))
    return torch.cat(parts)


# The parameters as the releases have them; pyproject.toml has the range of torch.
# fmt: off
def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1)):
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == int(cu_seq_q.diff().max())
    return attend(query, key, value, cu_seq_q, scale, window_size)


def torch_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    return torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None):
    assert causal
    groups = q.shape[1] // k.shape[1]
    q, k, v = (part.contiguous() for part in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    return torch_2_11(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale,
                      window_size=window_size)
# fmt: on


KERNELS = {"torch 2.11": torch_2_11, "torch 2.12 and 2.13": torch_2_12, "flash-attn 2": flash_2}


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """As on a GPU that has this kernel."""
    is_flash = request.param == "flash-attn 2"
    monkeypatch.setattr(varlen, "has_kernels", lambda device: True)
    monkeypatch.setattr(varlen, "_flash_function", lambda: flash_2 if is_flash else None)
    if not is_flash:
        monkeypatch.setattr(torch_varlen, "varlen_attn", KERNELS[request.param])
    varlen._varlen_shares_heads.cache_clear()
    WINDOWS.clear()
    yield request.param
    varlen._varlen_shares_heads.cache_clear()


@pytest.mark.parametrize("window", [None, 7])
def test_a_kernels_call_is_the_exact_path(kernel, window):
    torch.manual_seed(0)
    borders = (0, 5, 22, 60)
    packed = [torch.randn((1, heads, 60, 16), dtype=torch.bfloat16) for heads in (8, 2, 2)]
    segments: dict[str, Any] = {
        "segment_borders": torch.tensor(borders),
        "cu_seq_lens_q": torch.tensor(borders, dtype=torch.int32),
        "max_length_q": 38,
        "sliding_window": window,
    }
    fast, _ = varlen.varlen_attention(torch.nn.Module(), packed[0], packed[1], packed[2], None, **segments)
    assert [left for left, _ in WINDOWS] == [-1 if window is None else window - 1]
    fp32 = [part.float() for part in packed]  # no kernel computes in fp32
    exact, _ = varlen.varlen_attention(torch.nn.Module(), fp32[0], fp32[1], fp32[2], None, **segments)
    assert len(WINDOWS) == 1
    assert (fast.float() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [("flash-attn 2", {}), ("torch 2.12 and 2.13", {"adapter": None, "optimizer.lr": 1e-3})],
    ids=["lora", "all weights"],
    indirect=["kernel"],
)
def test_a_run_on_kernels_is_the_run_without(kernel, changes, tmp_path, monkeypatch):
    """bf16 under autocast, as a GPU trains; with all weights, rotary embeddings hand over fp32."""
    monkeypatch.setattr("tuner.models.arithmetic.computes_in_bf16", lambda device: True)
    config = override(SMALL, {"precision": "bf16", "max_steps": 2, "data.limit": 40} | changes)
    emulated = tuner.train(config, runs=tmp_path / "emulated")
    assert WINDOWS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "has_kernels", lambda device: False)
        exact = tuner.train(config, runs=tmp_path / "exact")
    losses = [[record["loss"] for record in run.metrics] for run in (emulated, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)
