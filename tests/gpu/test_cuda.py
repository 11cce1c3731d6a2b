"""What only a CUDA GPU can show. Written without one: unverified until it has run."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 7])
def test_varlen_on_cuda_equals_one_call_per_segment(window):
    from tuner.models.varlen import varlen_attention

    torch.manual_seed(0)
    borders = (0, 5, 22, 150)
    shapes = [(1, heads, borders[-1], 64) for heads in (8, 2, 2)]
    query, key, value = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes
    )
    segments = {
        "segment_borders": borders,
        "cu_seq_lens_q": torch.tensor(borders, device="cuda", dtype=torch.int32),
        "max_length_q": 128,
        "sliding_window": window,
    }
    fast, _ = varlen_attention(torch.nn.Module(), query, key, value, None, **segments)
    grads = torch.autograd.grad(fast.float().square().sum(), (query, key, value))
    exact = [tensor.detach().float().requires_grad_() for tensor in (query, key, value)]  # fp32: per segment
    slow, _ = varlen_attention(torch.nn.Module(), *exact, None, **segments)
    exact_grads = torch.autograd.grad(slow.square().sum(), exact)
    assert (fast.float() - slow).norm() / slow.norm() < 1e-2
    for one, two in zip(grads, exact_grads, strict=True):
        assert (one.float() - two).norm() / two.norm() < 2e-2


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_a_short_run_on_cuda_follows_the_cpu(tmp_path, quantization):
    import tuner
    from tests.equivalence.conftest import SMALL, curve
    from tuner.config import override

    config = override(SMALL, {"model.quantization": quantization})
    cpu, cuda = (
        tuner.train(override(config, {"device": device}), runs=tmp_path / device)
        for device in ("cpu", "cuda")
    )
    tolerance = 5e-2 if quantization == "int8" else 1e-3
    for one, two in zip(curve(cpu), curve(cuda), strict=True):
        assert one[:2] == two[:2]
        assert one[2:] == pytest.approx(two[2:], rel=tolerance)
