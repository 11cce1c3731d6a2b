"""`tuner check`: a dry run of a config with its models, tokenizers, templates and rows.

It loads with the functions that training uses, so it fails where training would; models are on the meta device, which
holds shapes without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from tuner.config import Freeze, SingleModelConfig, StageConfig, TrainingConfig
from tuner.data.dataset import Dataset
from tuner.errors import MissingError
from tuner.models.adapter_kinds import has_score
from tuner.models.adapters import belongs_to
from tuner.models.coverage import coverage
from tuner.models.load import Head, Loaded, load_model
from tuner.models.memory import MemoryBudget, MemoryPlan, Weights, memory_plan
from tuner.models.positions import Positions
from tuner.models.rope import describe_rope
from tuner.models.sharding import refuse_shards
from tuner.models.shared_rows import refuse_shared_rows
from tuner.models.tiled_mlp import refuse_tiles
from tuner.stages.memory_savings import Saving, savings
from tuner.stages.row_lengths import long_rows
from tuner.training.resume_rules import reach_sentences

if TYPE_CHECKING:  # a run of another stage does not load it
    from tuner.config import PolicyConfig
    from tuner.stages.memory_budget import Choice
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
    memory: MemoryPlan
    """What it is made of."""
    savings: tuple[Saving, ...]
    """Settings that would save memory, the largest saving first."""
    shapes: dict[str, str] = field(default_factory=dict[str, str])
    """Paths of models -> where their shapes are from, where some are not at hand and memory alone was estimated."""
    unchecked: str = ""
    """Why only memory was estimated: rows, plan and tokenizers were not checked. Empty: all was."""
    chosen: dict[str, Choice] = field(default_factory=dict[str, "Choice"])
    """What `memory` chooses, by the path of the run's part that has it: "", or "policy" and "reward"."""
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
        self,
        rows: Dataset[Any],
        plan: dict[str, Any],
        *,
        further: Mapping[str, float] | None = None,
    ) -> CheckReport:
        """The report of training this model on these rows.

        plan: the fields `steps`, `tokens`, `passes` and `fill`. further: bytes by name of what is held beside.
        """
        memory = self.memory(self.config, further)
        return CheckReport(
            **model_figures(self.loaded),
            trained=Weights.of(self.loaded).trained,
            data=str(rows.report),
            notes=(*self.loaded.notes, *long_rows(rows, Positions.of(self.loaded.transformer))),
            **plan,
            peak_gib=memory.peak / 2**30,
            memory=memory,
            savings=savings(self.config, memory, partial(self.memory, further=further)),
        )

    def memory(self, config: Any, further: Mapping[str, float] | None = None) -> MemoryPlan:
        """The memory of this model trained by a config that may differ in all but its weights."""
        # on the meta device a quantization is recorded, and not applied
        quantization = self.loaded.base.quantization or config.model.quantization
        loaded = replace(self.loaded, base=replace(self.loaded.base, quantization=quantization))
        head = not has_score(loaded.transformer)
        budget = memory_budget(config, config.tokens_per_pass, language_head=head)
        return memory_plan(budget, [loaded], further=further)


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
    step, data = getattr(config, "tokens_per_step", None), getattr(config, "data", None)
    generated, rows = _generated(config, tokens_per_pass)
    return MemoryBudget(
        precision=config.precision,
        optimizer_bits=config.optimizer.bits,
        tokens_per_pass=tokens_per_pass,
        gradient_checkpointing=config.gradient_checkpointing,
        adapter_dropout=0.0 if config.adapter is None else config.adapter.dropout,
        language_head=language_head,
        generates=rows > 0,
        generated=generated,
        generated_rows=rows,
        prefilled=min(generated, tokens_per_pass),
        shards=config.parallel.shard,
        row_processes=config.parallel.sequence,
        passes_share_casts=step is not None and step > tokens_per_pass,
        padded_to=0 if config.in_layouts else getattr(data, "max_length", 0),
        mlp_tile=config.mlp_tile,
    )


def _generated(config: Any, tokens_per_pass: int) -> tuple[int, int]:
    """Tokens held in a cache, and rows, where a stage answers held-out rows as it evaluates; 0 where it does not."""
    evaluation, data = config.evaluation, getattr(config, "data", None)
    rows = getattr(evaluation, "samples", 0)
    held_out = data is not None and (data.split.validation or data.validation_files)
    if data is None or not rows or not held_out or not hasattr(evaluation, "max_new_tokens"):
        return 0, 0
    # at most as many tokens as a pass has, but for a single row
    longest = data.max_length + evaluation.max_new_tokens
    return max(min(rows * longest, tokens_per_pass), longest), rows


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
    """Raise UserError for a model that cannot be laid out over processes, or over tiles, as a config says."""
    if config.mlp_tile is not None:
        refuse_tiles(loaded.model)
    if config.parallel.shard > 1:
        refuse_shards(loaded)
    if config.parallel.sequence > 1:
        refuse_shared_rows(loaded, config.parallel.sequence)


def check(
    config: StageConfig,
    *,
    tiny: bool = False,
    shapes: bool = False,
    processes: int = 1,
    card_gib: float | None = None,
) -> CheckReport:
    """Load everything that a run would, except weights. Raises UserError where a run would.

    tiny: where a model or a file of rows is not on this machine, use a small random model of the same family, or rows
    of data_templates. Memory is then estimated for the small model. shapes: where a model or a file of rows cannot be
    had, estimate memory alone, from shapes that ship with tuner. processes: of the run; card_gib: memory of its GPUs,
    None: of the one here; both count for what a config's `memory` chooses.
    """
    from tuner.stages.registry import stage_of  # stages import this module
    from tuner.stages.run_models import with_usable_models
    from tuner.stages.tiny import with_stand_ins

    config = with_usable_models(config)
    stage = stage_of(config)
    if not tiny:
        try:
            report = _check_fitted(stage, config, processes, card_gib)
        except MissingError as error:
            if not shapes:
                raise
            return _check_memory(stage, config, error, processes, card_gib)
        if not isinstance(config, TrainingConfig):
            return report
        unreached = reach_sentences(config.max_steps, report.steps, config.epochs)
        return replace(report, notes=(*report.notes, *unreached))
    with TemporaryDirectory() as folder:
        small, stand_ins, replaced = with_stand_ins(stage, config, Path(folder))
        report = stage.check(small, stand_ins)
        return replace(report, replaced=replaced)


def _check_fitted(
    stage: Stage[Any], config: StageConfig, processes: int, card_gib: float | None
) -> CheckReport:
    """The dry run with the settings that `memory` chooses."""
    from tuner.stages.memory_choice import chosen_in_check  # which imports this module

    config, chosen, notes = chosen_in_check(config, processes, card_gib)
    report = stage.check(config)
    return replace(report, chosen=chosen, notes=(*report.notes, *notes))


def _check_memory(
    stage: Stage[Any], config: StageConfig, missing: MissingError, processes: int, card_gib: float | None
) -> CheckReport:
    """The memory of a run some of whose models or rows are missing, from shapes; raises `missing` without them."""
    from tuner.stages.shapes import with_shapes  # which imports this module

    with TemporaryDirectory() as folder:
        shaped, origins = with_shapes(stage, config, Path(folder))
        report = _check_fitted(stage, shaped, processes, card_gib)
    # of example rows and small tokenizers: nothing that says anything of the run
    unknown = {"data": "", "steps": 0, "tokens": 0, "passes": None, "fill": 0.0}
    return replace(report, **unknown, warnings=(), notes=(), shapes=origins, unchecked=str(missing))
