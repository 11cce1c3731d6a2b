"""`tuner check`: a dry run of a config with its models, tokenizers, templates and rows.

It loads with the functions that training uses, so it fails where training would; models are on the meta device, which
holds shapes without weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from tuner.config import Freeze, SingleModelConfig, StageConfig, TrainingConfig
from tuner.data.dataset import Dataset
from tuner.errors import MissingError
from tuner.models.adapters import belongs_to, has_score
from tuner.models.coverage import coverage
from tuner.models.load import Head, Loaded, load_model
from tuner.models.memory import MemoryBudget, Weights, peak_bytes
from tuner.models.positions import Positions
from tuner.models.rope import describe_rope
from tuner.models.sharding import refuse_shards
from tuner.models.shared_rows import refuse_shared_rows
from tuner.stages.row_lengths import long_rows
from tuner.training.resume_rules import reach_sentences

if TYPE_CHECKING:  # a run of another stage does not load it
    from tuner.config import PolicyConfig
    from tuner.stages.stage import Stage


@dataclass(frozen=True)
class CheckReport:
    """Result of a dry run."""

    family: str
    """Class of the transformer."""
    parameters: int
    """Number of weights, without adapters."""
    trained: int
    """Number of trained weights."""
    rope: str
    """Description of the rotary position embedding."""
    coverage: dict[str, str]
    """"adapter" and "nf4" or "int8" -> the weights they cover and those they leave out, counted."""
    data: str
    """Report on the rows that were read."""
    steps: int
    """Optimizer steps of the whole run."""
    tokens: int
    """Tokens of the whole run, whether the loss is taken on them or not."""
    passes: int | None
    """Forward and backward passes of the whole run, over all devices; None where it depends on sampled answers."""
    fill: float
    """Mean fill of the steps, 0..1: of tokens_per_step, pairs_per_step or prompts_per_step."""
    peak_gib: float
    """Estimated peak memory of one device."""
    shapes: dict[str, str] = field(default_factory=dict[str, str])
    """Paths of models -> where their shapes are from, where some are not at hand and memory alone was estimated."""
    unchecked: str = ""
    """Why only memory was estimated: rows, plan and tokenizers were not checked. Empty: all was."""
    replaced: tuple[str, ...] = ()
    """Paths that `--tiny` replaced by a stand-in."""
    warnings: tuple[str, ...] = ()
    """Settings that would run, but are probably mistakes."""
    notes: tuple[str, ...] = ()
    """Consequences of settings that their reader may not expect."""


META = torch.device("meta")
"""Device of models without weights."""


@dataclass(frozen=True)
class CheckedModel:
    """The model of a stage with one role, as training loads it, but without weights."""

    config: SingleModelConfig
    loaded: Loaded

    def report(
        self, rows: Dataset[Any], plan: dict[str, Any], *, tokens_per_pass: int, further_bytes: float = 0.0
    ) -> CheckReport:
        """The report of training this model on these rows.

        plan: the fields `steps`, `tokens`, `passes` and `fill`. further_bytes: memory besides that of training itself.
        """
        budget = memory_budget(
            self.config, tokens_per_pass, language_head=not has_score(self.loaded.transformer)
        )
        # sampled are answers to validation rows
        budget = replace(budget, generates=budget.generates and rows.validation is not None)
        return CheckReport(
            **model_figures(self.loaded),
            trained=Weights.of(self.loaded).trained,
            data=str(rows.report),
            notes=(*self.loaded.notes, *long_rows(rows, Positions.of(self.loaded.transformer))),
            **plan,
            peak_gib=(peak_bytes(budget, [self.loaded]) + further_bytes) / 2**30,
        )


def model_figures(loaded: Loaded) -> dict[str, Any]:
    """The fields of a CheckReport that describe a model: `family`, `parameters`, `rope` and `coverage`."""
    weights = loaded.model.named_parameters()
    return {
        "family": type(loaded.transformer).__name__,
        "parameters": sum(weight.numel() for name, weight in weights if belongs_to(name, None)),
        "rope": describe_rope(loaded.transformer.config),
        "coverage": coverage(loaded.model, loaded.base.quantization),
    }


def memory_budget(
    config: SingleModelConfig | PolicyConfig, tokens_per_pass: int, *, language_head: bool
) -> MemoryBudget:
    """The settings of a config that determine the memory of its steps."""
    return MemoryBudget(
        precision=config.precision,
        optimizer_bits=config.optimizer.bits,
        tokens_per_pass=tokens_per_pass,
        gradient_checkpointing=config.gradient_checkpointing,
        adapter_dropout=0.0 if config.adapter is None else config.adapter.dropout,
        language_head=language_head,
        generates=hasattr(config, "sampling")
        or getattr(getattr(config, "evaluation", None), "samples", 0) > 0,
        shards=config.parallel.shard,
        row_processes=config.parallel.sequence,
    )


def check_model(
    config: SingleModelConfig, *, freeze: Freeze | None = None, head: Head = "language"
) -> CheckedModel:
    """Load a config's model as training does, but on the meta device. Raises UserError where training would."""
    loaded = load_model(
        config.model,
        precision=config.precision,
        device=META,
        adapter=config.adapter,
        freeze=freeze,
        seed=config.seed,
        head=head,
    )
    refuse_model_in_layout(config, loaded)
    return CheckedModel(config, loaded)


def refuse_model_in_layout(config: TrainingConfig, loaded: Loaded) -> None:
    """Raise UserError for a model that cannot be laid out over processes as a config says."""
    if config.parallel.shard > 1:
        refuse_shards(loaded)
    if config.parallel.sequence > 1:
        refuse_shared_rows(loaded, config.parallel.sequence)


def check(config: StageConfig, *, tiny: bool = False, shapes: bool = False) -> CheckReport:
    """Load everything that a run would, except weights. Raises UserError where a run would.

    tiny: where a model or a file of rows is not on this machine, use a small random model of the same family, or rows
    of data_templates. Memory is then estimated for the small model. shapes: where a model or a file of rows cannot be
    had, estimate memory alone, from shapes that ship with tuner.
    """
    from tuner.stages.registry import stage_of  # stages import this module
    from tuner.stages.run_models import with_usable_models
    from tuner.stages.tiny import with_stand_ins

    config = with_usable_models(config)
    stage = stage_of(config)
    if not tiny:
        try:
            report = stage.check(config)
        except MissingError as error:
            if not shapes:
                raise
            return _check_memory(stage, config, error)
        if not isinstance(config, TrainingConfig):
            return report
        unreached = reach_sentences(config.max_steps, report.steps, config.epochs)
        return replace(report, notes=(*report.notes, *unreached))
    with TemporaryDirectory() as folder:
        small, stand_ins, replaced = with_stand_ins(stage, config, Path(folder))
        report = stage.check(small, stand_ins)
        return replace(report, replaced=replaced)


def _check_memory(stage: Stage[Any], config: StageConfig, missing: MissingError) -> CheckReport:
    """The memory of a run some of whose models or rows are missing, from shapes; raises `missing` without them."""
    from tuner.stages.shapes import with_shapes  # which imports this module

    with TemporaryDirectory() as folder:
        shaped, origins = with_shapes(stage, config, Path(folder))
        report = stage.check(shaped)
    # of example rows and small tokenizers: nothing that says anything of the run
    unknown = {"data": "", "steps": 0, "tokens": 0, "passes": None, "fill": 0.0}
    return replace(report, **unknown, warnings=(), notes=(), shapes=origins, unchecked=str(missing))
