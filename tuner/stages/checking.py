"""A dry run: does the config hold together with its model, tokenizer, template and rows? Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tuner.config import (
    DPO,
    SFT,
    ModelStage,
    PackedStage,
    Preferences,
    RewardModel,
    Source,
    Stage,
    Text,
    override,
)
from tuner.data.load import Dataset
from tuner.data.load_pairs import answers_of_pairs
from tuner.evaluation.held_out import load_score
from tuner.models.adapters import add_adapter
from tuner.models.freeze import freeze
from tuner.models.load import load_model_config
from tuner.models.locate import locate
from tuner.models.memory import Weights, peak_bytes
from tuner.models.rope import describe_rope
from tuner.models.tiny import tiny_model_folder
from tuner.resources import PREFIX, row_examples_folder
from tuner.stages.rows import load_rows, packed, plan
from tuner.training.pair_plan import PairPlan


@dataclass(frozen=True)
class Checked:
    """What a dry run found out."""

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
    """Optimiser steps of the whole run."""
    tokens: int
    """Tokens of the whole run, learned or not."""
    passes: int
    """Forward and backward passes of the whole run, over all devices."""
    fill: float
    """Share of tokens_per_step that a step holds, on average."""
    peak_gib: float
    """Estimated peak memory of one device."""
    replaced: tuple[str, ...]
    """What `--tiny` put something small in place of."""


def check(config: Stage, *, tiny: bool = False) -> Checked:
    """Load everything a run would, but weights; raises UserError where a run would.

    tiny: put a random small model of the same family, and rows of data_templates, in place of what is not at
    hand. The memory is estimated for the model that is checked, so for the tiny one with `tiny`.
    """
    if not tiny:
        return _check(config, ())
    with TemporaryDirectory() as folder:
        small, replaced = _made_tiny(config, Path(folder))
        return _check(small, replaced)


def _check(config: Stage, replaced: tuple[str, ...]) -> Checked:
    config = _modelled(config)
    if isinstance(config, SFT):
        load_score(config.evaluation.score)
    location = locate(config.model, weights=False)
    adapter = config.adapter or location.lora
    shape = load_model_config(config.model)
    with torch.device("meta"):
        kind = AutoModelForCausalLM
        if isinstance(config, RewardModel):
            kind, shape.num_labels = AutoModelForSequenceClassification, 1
        model = kind.from_config(shape, trust_remote_code=config.model.trust_remote_code)
    model.requires_grad_(adapter is None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    wrapped = add_adapter(model, adapter, config.seed) if adapter else model
    if isinstance(config, PackedStage):
        freeze(wrapped, config.freeze)
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    data = load_rows(config)
    planned = _plan_pairs(config, data) if isinstance(config, DPO) else _plan(packed(config), data)
    peak = peak_bytes(config, shape, Weights.of(wrapped), location.reference.quantization)
    if isinstance(config, DPO) and adapter is None:
        peak += 4 * parameters  # the copy that the policy is compared with
    return Checked(
        family=type(model).__name__,
        parameters=parameters,
        trained=trained,
        rope=describe_rope(shape),
        data=str(data.report),
        **planned,
        peak_gib=peak / 2**30,
        replaced=replaced,
    )


def _plan(config: PackedStage, data: Dataset[Any]) -> dict[str, Any]:
    """Steps, tokens, passes and fill of a run on packed rows."""
    stream = plan(config, data)
    steps = min(len(stream.steps), config.max_steps or len(stream.steps))
    tokens = sum(stream.tokens(step) for step in range(steps))
    passes = sum(len(stream.passes(step)) for step in range(steps))
    return {
        "steps": steps,
        "tokens": tokens,
        "passes": passes,
        "fill": tokens / (steps * config.tokens_per_step),
    }


def _plan_pairs(config: DPO, data: Dataset[Any]) -> dict[str, Any]:
    """The same of a run on pairs, in one process; their tokens by the mean over all pairs."""
    planned, lengths = PairPlan(config, len(data.train.better)), data.train.sequences.lengths
    tokens = sum(int(lengths[answers].sum()) for answers in answers_of_pairs(data.train))
    return {
        "steps": planned.steps,
        "tokens": round(tokens * planned.seen / planned.pairs),
        "passes": planned.passes,
        "fill": planned.seen / (planned.steps * config.pairs_per_step),
    }


def _modelled(config: Stage) -> ModelStage:
    """The config as one of a stage that trains one model; UserError for others."""
    return config if isinstance(config, DPO) else packed(config)


def _made_tiny(config: Stage, folder: Path) -> tuple[Stage, tuple[str, ...]]:
    """The config with a small model and rows of data_templates where the real ones are not at hand."""
    config = _modelled(config)
    replaced: list[str] = []
    changes: dict[str, Any] = {}
    if not _at_hand(config.model.path):
        changes["model.path"] = str(tiny_model_folder(config.model.path, folder / "model"))
        changes["model.revision"] = None
        replaced.append(config.model.path)
    for name in ("files", "validation_files", "test_files"):
        files = getattr(config.data, name)
        paths = [file.path if isinstance(file, Source) else file for file in files]
        missing = [path for path in paths if not _at_hand(path)]
        if missing:
            changes[f"data.{name}"] = [str(_example_rows(config))]
            replaced += missing
    return override(config, changes), tuple(replaced)


def _example_rows(config: ModelStage) -> Path:
    names: dict[type, str] = {Text: "text.jsonl", Preferences: "pair.jsonl"}
    name = names.get(type(config.data), "messages.jsonl")
    return row_examples_folder() / ("pair_messages.jsonl" if isinstance(config, DPO) else name)  # no weights


def _at_hand(path: str) -> bool:
    return (
        path.startswith(PREFIX) or Path(path).exists() or bool(list(Path().glob(path)) if "*" in path else ())
    )
