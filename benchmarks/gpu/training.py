"""A training run of tuner, measured: tokens a second, the share of the card's peak, and memory beside its estimate."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import tuner
from benchmarks.gpu.case import Measurement, NotHereError, Place
from benchmarks.gpu.flops import Matrices, batch_flops
from benchmarks.gpu.shapes import model_folder
from tuner.config import SFT, AdamW, Checkpoint, Evaluation, LoRA, Model, StageConfig, Text
from tuner.config.training import Kernels, Recomputation
from tuner.models.kernels import compiled
from tuner.models.kernels.registry import KERNELS
from tuner.models.load import Loaded, load_model
from tuner.stages.check import check
from tuner.stages.data_view import load_rows
from tuner.stages.packed_rows import plan
from tuner.training.watchers import Outcome, Record, Sample, Tables

WARM_UP = 2
"""Steps that are not timed: kernels are chosen and caches filled in them."""
CHARACTERS = 5
"""Of text for each token that is needed, of which the small tokenizer makes more than one."""
DRY_SAMPLE, DRY_TILE = 32, 16
"""Tokens of a sample, and of an MLP's tile, in a dry run."""
ACTIVATIONS: dict[Recomputation, str] = {
    False: "kept",
    True: "recomputed",
    "selective": "recomputed but for products",
    "offload": "recomputed from inputs on the host",
}
"""What becomes of a layer's activations, in words."""
MATRIX_PEAK = ("speed.matrix_peak", "peak")
"""Case and name of the value that utilization is relative to."""


@dataclass(frozen=True)
class Training:
    """Settings of a measured run: passes over samples of one length."""

    shape: str
    sample: int
    """Tokens of each sample."""
    samples: int = 1
    """In a pass."""
    passes: int = 1
    """In a step."""
    r: int | None = 64
    """Rank of the adapter; None: all weights are trained."""
    quantization: Literal["nf4", "int8"] | None = None
    dropout: float = 0.0
    checkpointing: Recomputation = False
    mlp_tile: int | None = None
    bits: Literal[32, 8] = 32
    paged: bool = False
    kernels: Kernels = "plain"
    steps: int = 6

    def config(self, place: Place) -> SFT:
        """As it is trained; in a dry run with a small model and short samples."""
        sample = place.size(self.sample, DRY_SAMPLE)
        tokens = sample * self.samples
        return SFT(
            name="run",
            model=Model(path=str(model_folder(self.shape, place)), quantization=self.quantization),
            adapter=None if self.r is None else LoRA(r=place.size(self.r, 4), dropout=self.dropout),
            data=Text(
                files=(str(write_text(place, self.steps * self.passes * self.samples, sample)),),
                max_length=sample,
                too_long="cut",
            ),
            optimizer=AdamW(lr=1e-5, bits=self.bits, paged=self.paged),
            tokens_per_pass=tokens,
            tokens_per_step=tokens * self.passes,
            max_steps=place.size(self.steps, WARM_UP + 1),
            gradient_checkpointing=self.checkpointing,
            mlp_tile=None if self.mlp_tile is None else place.size(self.mlp_tile, DRY_TILE),
            kernels=self.kernels,
            checkpoint=Checkpoint(every=None),
            evaluation=Evaluation(samples=0),
            device="cuda" if place.device.type == "cuda" else "cpu",
        )

    def words(self, place: Place) -> str:
        """The settings that differ between cases, in words."""
        sample, adapter = (
            place.size(self.sample, DRY_SAMPLE),
            "all weights" if self.r is None else f"r {self.r}",
        )
        kind = self.quantization or "bf16"
        tiled = "" if self.mlp_tile is None else f", MLPs of {place.size(self.mlp_tile, DRY_TILE):,} tokens"
        kernels = self.kernels if isinstance(self.kernels, str) else ", ".join(self.kernels)
        return (
            f"{self.shape} {kind}, {adapter}, {self.samples} × {sample:,} a pass, "
            f"activations {ACTIVATIONS[self.checkpointing]}{tiled}"
            + ("" if kernels == "plain" else f", kernels {kernels}")
        )


class LoadingPeak:
    """A watcher that notes the peak of memory before the first step, and lets the steps' own begin there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.gib = 0.0

    def begin(self, run_folder: Path, config: StageConfig, first_step: int, total_steps: int) -> None:
        if self._device.type == "cuda":
            self.gib = torch.cuda.max_memory_allocated(self._device) / 2**30
            torch.cuda.reset_peak_memory_stats(self._device)

    def step(self, record: Record) -> None: ...

    def samples(self, step: int, samples: list[Sample]) -> None: ...

    def message(self, text: str) -> None: ...

    def report(self, tables: Tables) -> None: ...

    def end(self, outcome: Outcome) -> None: ...


def measure_training(training: Training, place: Place) -> Iterator[Measurement]:
    """Train, and measure the steps after the warm-up."""
    for name in () if isinstance(training.kernels, str) else training.kernels:
        if (reason := KERNELS[name].unavailable(place.device)) is not None:
            raise NotHereError(f"{name} {reason}")
    if place.is_dry:  # layers are traced, and no code is made of them: compilers take minutes
        compiled.BACKEND = "aot_eager"
    config, loading = training.config(place), LoadingPeak(place.device)
    metrics = tuner.train(config, runs=place.work / "runs", watchers=[loading]).metrics
    yield Measurement("peak", metrics[-1]["memory_gib"], "GiB", predicted_gib(config))
    yield Measurement("loading", loading.gib, "GiB")
    steps = range(WARM_UP, len(metrics))
    seconds = [metrics[step]["seconds"] for step in steps]
    stream = plan(config, load_rows(config))
    tokens = statistics.mean(stream.tokens(step) for step in steps)
    yield Measurement("speed", tokens / statistics.median(seconds), "tokens/s", setting=training.words(place))
    matrices = Matrices.of(on_meta(config))
    flops = statistics.mean(batch_flops(matrices, stream.batches(step)) for step in steps)
    yield from utilization(flops / statistics.median(seconds), place)
    yield Measurement("unevenness", max(seconds) / min(seconds) - 1, "", setting="slowest step / fastest - 1")


def predicted_gib(config: StageConfig) -> float:
    """What `tuner check --memory` says of a config: the one place that asks it."""
    return check(config).peak_gib


def on_meta(config: SFT) -> Loaded:
    """The model of a config as it is trained, without its weights."""
    return load_model(
        config.model, precision=config.precision, device=torch.device("meta"), adapter=config.adapter
    )


def utilization(flops_per_second: float, place: Place) -> Iterator[Measurement]:
    """Necessary operations a second, and their share of the matrix peak that this call has measured."""
    yield Measurement("necessary", flops_per_second / 1e12, "TFLOP/s")
    peak = place.earlier.get(MATRIX_PEAK)
    if peak is not None:
        yield Measurement("utilization", flops_per_second / 1e12 / peak, "of peak")


def write_text(place: Place, documents: int, tokens: int) -> Path:
    """A file of documents, each of at least so many tokens."""
    from pydoc_data.topics import topics

    words = itertools.cycle(" ".join(topics.values()).split())
    rows = []
    for _ in range(documents):
        text, size = [], 0
        while size < CHARACTERS * tokens:
            text.append(next(words))
            size += len(text[-1]) + 1
        rows.append(json.dumps({"text": " ".join(text)}))
    file = place.work / "text.jsonl"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file
