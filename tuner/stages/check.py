"""`tuner check`: does a config hold together with its models, tokenizers, templates and rows? Nothing is trained.

What a run loads is loaded by the same functions, on the meta device: shapes without weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from tuner.config import Freeze, SingleModelConfig, StageConfig
from tuner.data.dataset import Dataset
from tuner.models.adapters import belongs_to, has_score
from tuner.models.load import Head, Loaded, load_model
from tuner.models.memory import MemoryBudget, Weights, peak_bytes
from tuner.models.rope import describe_rope

if TYPE_CHECKING:  # a run of another stage does not load it
    from tuner.config import PolicyConfig


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


META = torch.device("meta")
"""Where models are built without weights."""


@dataclass(frozen=True)
class CheckedModel:
    """A stage's one model as training would load it, without its weights."""

    config: SingleModelConfig
    loaded: Loaded

    def report(
        self, rows: Dataset[Any], plan: dict[str, Any], *, tokens_per_pass: int, further_bytes: float = 0.0
    ) -> CheckReport:
        """The report of a run of this model over these rows. further_bytes: of memory beside training's own."""
        budget = memory_budget(
            self.config, tokens_per_pass, language_head=not has_score(self.loaded.transformer)
        )
        return CheckReport(
            **model_figures(self.loaded),
            trained=Weights.of(self.loaded).trained,
            data=str(rows.report),
            **plan,
            peak_gib=(peak_bytes(budget, [self.loaded]) + further_bytes) / 2**30,
        )


def model_figures(loaded: Loaded) -> dict[str, Any]:
    """Class, number of weights without adapters, and rotary positions of a model."""
    weights = loaded.model.named_parameters()
    return {
        "family": type(loaded.transformer).__name__,
        "parameters": sum(weight.numel() for name, weight in weights if belongs_to(name, None)),
        "rope": describe_rope(loaded.transformer.config),
    }


def memory_budget(
    config: SingleModelConfig | PolicyConfig, tokens_per_pass: int, *, language_head: bool
) -> MemoryBudget:
    """The settings of a config that decide how much memory its steps need."""
    return MemoryBudget(
        precision=config.precision,
        optimizer_bits=config.optimizer.bits,
        tokens_per_pass=tokens_per_pass,
        gradient_checkpointing=config.gradient_checkpointing,
        adapter_dropout=0.0 if config.adapter is None else config.adapter.dropout,
        language_head=language_head,
    )


def check_model(
    config: SingleModelConfig, *, freeze: Freeze | None = None, head: Head = "language"
) -> CheckedModel:
    """Load a config's model as training does, on the meta device. Raises UserError where training would."""
    loaded = load_model(
        config.model,
        precision=config.precision,
        device=META,
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
