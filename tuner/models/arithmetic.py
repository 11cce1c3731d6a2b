"""Precision of matrix products: bf16 where the device computes in it, else fp32 from the same weights."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import nn

Precision = Literal["bf16", "fp32"]


def product_precision(device: torch.device, precision: Precision) -> Precision:
    """The precision that products are computed in where `precision` is asked for."""
    return precision if precision == "fp32" or computes_in_bf16(device) else "fp32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Context in which products are computed in `product_precision`."""
    enabled = product_precision(device, precision) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@functools.cache
def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device has kernels for products in bf16.

    A CPU without AVX-512 has none: torch then multiplies number by number, some 40 times slower than in fp32. A GPU
    before Ampere (T4, V100) takes bf16, but only emulates it.
    """
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device.type != "cuda" or not torch.cuda.is_available():  # planned for, not computed on
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def precision_notes(device: torch.device, precision: Precision) -> list[str]:
    """A sentence where products are computed in another precision than asked for."""
    if product_precision(device, precision) == precision:
        return []
    kind = "CPU" if device.type == "cpu" else "GPU"
    return [
        f"this {kind} has no bf16 arithmetic: products are computed in fp32, from weights rounded to bf16 (the same "
        "model, other rounding)"
    ]


def compute_in_fp32(model: nn.Module) -> None:
    """Make a model held in bf16 compute in fp32 with the same weights, 4-bit layers included."""
    for weight in model.parameters():
        if weight.dtype == torch.bfloat16:
            weight.data = weight.data.float()
    for module in model.modules():
        if getattr(module, "compute_dtype", None) == torch.bfloat16:
            module.compute_dtype = torch.float32  # pyright: ignore[reportArgumentType]


def hold_in(precision: Precision, model: nn.Module, device: torch.device, full: bool) -> None:
    """Convert weights, now that it is known which of them are frozen, to what they are held and multiplied in."""
    if full and precision == "bf16":
        _hold_frozen_in_bf16(model)
    if product_precision(device, precision) != precision:
        compute_in_fp32(model)


def _hold_frozen_in_bf16(model: nn.Module) -> None:
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
