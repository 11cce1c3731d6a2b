"""The rate of matrix products that this card reaches, against which speeds are measured in the same call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks.gpu.case import Measurement, Place

SIZES = (8192, 4096)
"""Of square products: the largest fills the card; the other shows how much a layer's own size costs."""
REPEATS = 20


def measure(place: Place) -> Iterator[Measurement]:
    """TFLOP/s of products in bf16, of random numbers: zeros would be faster. `peak` is that of the largest size."""
    for size in SIZES:
        name = "peak" if size == max(SIZES) else f"at_{size}"
        yield Measurement(name, _rate(place, place.size(size, 256)), "TFLOP/s", setting=f"bf16, {size}³")


def _rate(place: Place, size: int) -> float:
    """Median over repeats; inputs take turns, so that none is in the cache."""
    dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    pairs = [
        [torch.randn(size, size, device=place.device, dtype=dtype) for _ in range(2)]
        for _ in range(place.size(4, 1))
    ]
    out = torch.empty(size, size, device=place.device, dtype=dtype)
    seconds = []
    for repeat in range(place.size(REPEATS, 2) + 3):
        left, right = pairs[repeat % len(pairs)]
        seconds.append(timed(place, left, right, out))
    return 2 * size**3 / statistics.median(seconds[3:] or seconds) / 1e12


def timed(place: Place, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    """Seconds of one product: by the device's own clock where it has one."""
    if place.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(left, right, out=out)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start_seconds = time.perf_counter()
    torch.mm(left, right, out=out)
    return time.perf_counter() - start_seconds
