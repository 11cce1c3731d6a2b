"""A dry run: does the config hold together with its model, tokenizer, template and rows? Nothing is trained."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tuner.config import (
    DPO,
    PPO,
    SFT,
    LoRA,
    PackedConfig,
    Preferences,
    Prompts,
    Replay,
    RewardModel,
    SingleModelConfig,
    Source,
    StageConfig,
    Text,
    override,
)
from tuner.data.dataset import Dataset, load_data
from tuner.data.load_pairs import answers_of_pairs
from tuner.data.load_prompts import load_prompts
from tuner.evaluation.held_out_chat import load_score
from tuner.evaluation.judged import load_rule
from tuner.models.adapters import belongs_to, is_adapted
from tuner.models.kv_cache import numbers_per_token
from tuner.models.load import Loaded, load_model
from tuner.models.load_roles import load_policy_roles
from tuner.models.memory import MemoryBudget, Weights, peak_bytes, roles_bytes
from tuner.models.roles import Role, Roles
from tuner.models.rope import describe_rope
from tuner.models.tiny import tiny_model_folder
from tuner.resources import PREFIX, row_examples_folder
from tuner.stages.rl.prepare import policy_models
from tuner.stages.rows import all_warm_up, load_rows, packed, plan, plan_run, reward_reader
from tuner.training.pair_plan import PairPlan

META = torch.device("meta")
"""Models are built here, without weights."""


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
    passes: int | None
    """Forward and backward passes of the whole run, over all devices; None of PPO, whose answers are still to come."""
    fill: float
    """Share of tokens_per_step (pairs_per_step, prompts_per_step) that a step holds, on average."""
    peak_gib: float
    """Estimated peak memory of one device."""
    replaced: tuple[str, ...]
    """What `--tiny` put something small in place of."""
    warnings: tuple[str, ...] = ()
    """What would hold, and is hardly meant."""


def check(config: StageConfig, *, tiny: bool = False) -> Checked:
    """Load everything a run would, but weights; raises UserError where a run would.

    tiny: put a random small model of the same family, and rows of data_templates, in place of what is not at
    hand. The memory is estimated for the model that is checked, so for the tiny one with `tiny`.
    """
    if not tiny:
        return _check(config, ())
    with TemporaryDirectory() as folder:
        small, replaced = _made_tiny(config, Path(folder))
        if isinstance(config, PPO):
            return _check_policy(small, replaced, stands_in=not _at_hand(config.reward.path))
        return _check(small, replaced)


def _check(config: StageConfig, replaced: tuple[str, ...]) -> Checked:
    if isinstance(config, PPO):
        return _check_policy(config, replaced)
    config = _modelled(config)
    if isinstance(config, SFT):
        load_score(config.evaluation.score)
    loaded = load_model(
        config.model,
        precision=config.precision,
        device=META,
        adapter=config.adapter,
        freeze=config.freeze if isinstance(config, PackedConfig) else None,
        seed=config.seed,
        head="score" if isinstance(config, RewardModel) else "language",
    )
    facts = _facts(loaded)
    data = load_rows(config, loaded.tokenizer)
    planned = _plan_pairs(config, data) if isinstance(config, DPO) else _plan(packed(config), data)
    peak = peak_bytes(_budget(config, config.tokens_per_pass), [loaded])
    if isinstance(config, DPO) and not is_adapted(loaded.model):
        peak += 4 * facts["parameters"]  # the copy that the policy is compared with
    return Checked(
        **facts,
        trained=Weights.of(loaded).trained,
        data=str(data.report),
        **planned,
        peak_gib=peak / 2**30,
        replaced=replaced,
    )


def _facts(loaded: Loaded) -> dict[str, Any]:
    """Family, number of weights without adapters, and rotary positions of a model."""
    weights = loaded.model.named_parameters()
    return {
        "family": type(loaded.transformer).__name__,
        "parameters": sum(weight.numel() for name, weight in weights if belongs_to(name, None)),
        "rope": describe_rope(loaded.transformer.config),
    }


def _budget(config: Any, tokens_per_pass: int) -> MemoryBudget:
    """What of a config decides how much memory its steps need."""
    return MemoryBudget(
        precision=config.precision,
        optimizer_bits=config.optimizer.bits,
        tokens_per_pass=tokens_per_pass,
        gradient_checkpointing=config.gradient_checkpointing,
        adapter_dropout=0.0 if config.adapter is None else config.adapter.dropout,
        language_head=isinstance(config, SFT | PPO),
    )


def _plan(config: PackedConfig, data: Dataset[Any]) -> dict[str, Any]:
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


def _modelled(config: StageConfig) -> SingleModelConfig:
    """The config as one of a stage that trains one model; UserError for others."""
    return config if isinstance(config, DPO) else packed(config)


def _check_policy(config: PPO, replaced: tuple[str, ...], stands_in: bool = False) -> Checked:
    """The same of PPO: its policy, its reward model, its prompts and replayed rows.

    stands_in: the reward model is an untrained small one: it has no template and no conditions, and no critic can
    start from it.
    """
    load_rule(config.evaluation.rule)
    roles = _load_roles(config, stands_in)
    facts, tokenizer = _facts(roles.loaded), roles.tokenizer
    prompts = load_prompts(config.prompts, tokenizer, None if stands_in else reward_reader(config))
    replay = None if config.replay is None else load_data(config.replay.data, tokenizer)
    stream = plan_run(config, prompts)
    steps = min(len(stream), config.max_steps or len(stream))
    asked = steps * (float(prompts.train.lengths.mean()) + config.sampling.max_new_tokens)
    answered = min(config.prompts_per_step, stream.drawn)
    return Checked(
        **facts,
        trained=sum(
            weight.numel() for name in ("policy", "critic") for weight in roles.trained(name).values()
        ),
        data="; ".join(str(part.report) for part in (prompts, replay) if part is not None),
        steps=steps,
        tokens=round(asked * answered),
        passes=None,
        fill=answered / config.prompts_per_step,
        peak_gib=policy_peak(config, roles) / 2**30,
        replaced=replaced,
        warnings=(*_two_bases(config, roles, stands_in), *all_warm_up(config, steps)),
    )


def _load_roles(config: PPO, stands_in: bool) -> Roles:
    """The roles of a config without their weights; a stand-in for the reward model has one of its own beside them."""
    models = policy_models(config)
    if not stands_in:
        return load_policy_roles(models, META, nullcontext).roles
    adapter = None if config.roles == "shared" else config.critic_adapter
    models = replace(models, reward=None, critic_from="policy", critic_adapter=adapter)
    reward = load_model(config.reward, precision=config.precision, device=META, train=False, head="score")
    roles = load_policy_roles(models, META, nullcontext).roles
    return Roles({name: roles[name] for name in roles} | {"reward": Role(reward)}, nullcontext)


def _two_bases(config: PPO, roles: Roles, stands_in: bool) -> list[str]:
    if stands_in or config.roles == "separate" or len(roles.models) == 1:
        return []
    return [
        "policy and reward model stand on two bases, which are both held: they differ, or in quantization, rope or "
        "precision, or the reward model is no adapter"
    ]


def policy_peak(config: PPO, roles: Roles) -> float:
    """Estimated peak memory, in bytes, with the cache of a step's answers."""
    plain = 2 if config.precision == "bf16" else 4
    longest = config.prompts_per_step * (config.prompts.max_length + config.sampling.max_new_tokens)
    per_token = numbers_per_token(roles.loaded.transformer.config) * plain
    cache = min(config.sampling.cache_gib * 2**30, longest * per_token)
    return roles_bytes(_budget(config, config.tokens_per_pass), roles, cache)


def _made_tiny(config: StageConfig, folder: Path) -> tuple[StageConfig, tuple[str, ...]]:
    """The config with a small model and rows of data_templates where the real ones are not at hand."""
    replaced: list[str] = []
    changes: dict[str, Any] = {}
    policy = isinstance(config, PPO)
    for name in ("policy", "reward") if policy else ("model",):
        model = getattr(config if policy else _modelled(config), name)
        if not _at_hand(model.path):
            changes[f"{name}.path"] = str(
                tiny_model_folder(model.path, folder / name, score=name == "reward")
            )
            changes[f"{name}.revision"] = None
            replaced.append(model.path)
    if policy and "policy.path" in changes and config.adapter is None and config.roles == "shared":
        changes["adapter"] = LoRA()  # what its run would have brought
    for part, rows in _rows_of(config):
        for name in ("files", "validation_files", "test_files"):
            paths = [file.path if isinstance(file, Source) else file for file in getattr(rows, name)]
            missing = [path for path in paths if not _at_hand(path)]
            if missing:
                changes[f"{part}.{name}"] = [str(_example_rows(config, rows))]
                replaced += missing
    return override(config, changes), tuple(replaced)


def _rows_of(config: StageConfig) -> list[tuple[str, Any]]:
    """The parts of a config that name rows."""
    parts = ("prompts", "replay") if isinstance(config, PPO) else ("data",)
    return [(part, rows) for part in parts if (rows := getattr(config, part)) is not None]


def _example_rows(config: StageConfig, rows: Any) -> Path:
    names: dict[type, str] = {Text: "text.jsonl", Preferences: "pair.jsonl", Prompts: "prompt.jsonl"}
    name = names.get(type(rows), "messages.jsonl")
    if isinstance(rows, Replay) and rows.template is None:
        name = "text.jsonl"
    return row_examples_folder() / ("pair_messages.jsonl" if isinstance(config, DPO) else name)  # no weights


def _at_hand(path: str) -> bool:
    return (
        path.startswith(PREFIX) or Path(path).exists() or bool(list(Path().glob(path)) if "*" in path else ())
    )
