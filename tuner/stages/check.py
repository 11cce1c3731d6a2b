"""`tuner check`: does a config hold together with its models, tokenizers, templates and rows? Nothing is trained.

What a run loads is loaded by the same functions, on the meta device: shapes without weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tuner.config import Freeze, SingleModelConfig, StageConfig
from tuner.data.dataset import Dataset
from tuner.models.load import Head, Loaded, load_model
from tuner.models.memory import MemoryBudget, Weights, peak_bytes
from tuner.models.rope import describe_rope


@dataclass(frozen=True)
class CheckReport:
    """What a dry run established."""

    family: str
    """Class of the model."""
    parameters: int
    """Weights of the base."""
    trained: int
    """Weights that are trained."""
    rope: str
    """Rotary positions, in words."""
    data: str
    """What became of the rows, in words."""
    steps: int
    """Optimizer steps of the whole run."""
    tokens: int
    """Tokens of the whole run, whether the loss is taken on them or not."""
    passes: int | None
    """Forward and backward passes of the whole run, over all devices; None where answers are still to be sampled."""
    fill: float
    """Mean share of tokens_per_step (pairs_per_step, prompts_per_step) that a step holds."""
    peak_gib: float
    """Estimated peak memory of one device."""
    replaced: tuple[str, ...] = ()
    """What `--tiny` put something small in place of."""
    warnings: tuple[str, ...] = ()
    """What would run, and is hardly meant."""


@dataclass(frozen=True)
class CheckedModel:
    """A stage's one model as training would load it, without its weights."""

    config: SingleModelConfig
    loaded: Loaded

    @property
    def is_adapted(self) -> bool:
        return self.loaded.model is not self.loaded.transformer

    @property
    def weights(self) -> Weights:
        return Weights.of(self.loaded.model)

    @property
    def parameters(self) -> int:
        """Weights of the base, without adapters."""
        weights = self.weights
        return weights.linear + weights.other + (0 if self.is_adapted else weights.trained)

    def report(self, rows: Dataset[Any], plan: dict[str, Any], *, further_bytes: float = 0.0) -> CheckReport:
        """The report of a run of this model over these rows. further_bytes: of memory beside training's own."""
        budget = MemoryBudget.of(
            self.config, language_head=self.loaded.transformer.get_output_embeddings() is not None
        )
        shape, weights = self.loaded.transformer.config, self.weights
        peak = peak_bytes(budget, shape, weights, self.loaded.base.quantization) + further_bytes
        return CheckReport(
            family=type(self.loaded.transformer).__name__,
            parameters=self.parameters,
            trained=weights.trained,
            rope=describe_rope(shape),
            data=str(rows.report),
            **plan,
            peak_gib=peak / 2**30,
        )


def check_model(
    config: SingleModelConfig, *, freeze: Freeze | None = None, head: Head = "language"
) -> CheckedModel:
    """Load a config's model as training does, on the meta device. Raises UserError where training would."""
    loaded = load_model(
        config.model,
        precision=config.precision,
        device=torch.device("meta"),
        adapter=config.adapter,
        freeze=freeze,
        seed=config.seed,
        head=head,
    )
    return CheckedModel(config, loaded)


def check(config: StageConfig, *, tiny: bool = False) -> CheckReport:
    """Load everything a run would, but weights; raises UserError where a run would.

    tiny: put a random small model of the same family, and rows of data_templates, in place of what is not at
    hand. The memory is estimated for the model that is checked, so for the tiny one with `tiny`.
    """
    from tuner.stages.registry import stage_of
    from tuner.stages.tiny import with_stand_ins

    stage = stage_of(config)
    if not tiny:
        return stage.check(config)
    with TemporaryDirectory() as folder:
        small, stand_ins, replaced = with_stand_ins(stage, config, Path(folder))
        report = stage.check(small, stand_ins)
        return CheckReport(**{**vars(report), "replaced": replaced})
