"""On a CPU without bf16 arithmetic, a model computes in fp32 from the weights it would have in bf16."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from tuner.config import LoRA, Model
from tuner.models import arithmetic
from tuner.models.generate import unpacked
from tuner.models.load import Loaded, load_model
from tuner.training import devices

CPU = torch.device("cpu")
COMPUTES_IN_BF16 = arithmetic.computes_in_bf16
"""Before tests replace it."""


@pytest.fixture
def no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "computes_in_bf16", lambda device: device.type != "cpu")


def load(precision: arithmetic.Precision, quantization: str | None = None) -> Loaded:
    model = Model(path="tuner:tiny", quantization=quantization)  # type: ignore[arg-type]
    return load_model(model, precision=precision, device=CPU, adapter=LoRA(r=2))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_weights_are_rounded_to_bf16_and_products_are_in_fp32(
    no_bf16: None, quantization: str | None
) -> None:
    rounded, exact = load("bf16", quantization), load("fp32", quantization)
    assert rounded.precision == "bf16"
    assert any("this CPU has no bf16 arithmetic" in note for note in rounded.notes)
    assert not any("arithmetic" in note for note in exact.notes)
    weights = [weight for weight in rounded.model.parameters() if weight.is_floating_point()]
    assert {weight.dtype for weight in weights} == {torch.float32}
    if quantization is None:
        plain = dict(exact.model.named_parameters())
        for name, weight in rounded.model.named_parameters():
            if not weight.requires_grad:
                assert torch.equal(weight, plain[name].bfloat16().float())
    tokens = torch.arange(5, 25)[None]
    with unpacked(rounded.model) as transformer, arithmetic.autocast(CPU, "bf16"):
        assert transformer(tokens).logits.dtype == torch.float32


@pytest.mark.parametrize(("supported", "products"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp32_and_says_so(
    monkeypatch: pytest.MonkeyPatch, supported: bool, products: str
) -> None:
    """As a T4 and a V100 do: torch counts them among those that support bf16, unless asked about emulation."""
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported or including_emulation
    )
    monkeypatch.setattr(arithmetic, "computes_in_bf16", COMPUTES_IN_BF16)
    COMPUTES_IN_BF16.cache_clear()
    try:
        assert arithmetic.product_precision(gpu, "bf16") == products
        notes = arithmetic.precision_notes(gpu, "bf16")
    finally:
        COMPUTES_IN_BF16.cache_clear()
    assert bool(notes) is not supported
    assert all("this GPU has no bf16 arithmetic: products are computed in fp32" in note for note in notes)


def test_devices_say_what_they_compute_in(no_bf16: None) -> None:
    assert devices.Devices(device="cpu", precision="bf16").place["products"] == "fp32"
    assert arithmetic.product_precision(torch.device("cuda"), "bf16") == "bf16"
