"""A dry run: does the config hold together with its model, tokenizer, template and rows? Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

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
from tuner.errors import UserError
from tuner.evaluation.held_out_chat import load_score
from tuner.evaluation.judged import load_rule
from tuner.models.adapters import add_adapter
from tuner.models.fingerprint import fingerprint
from tuner.models.freeze import freeze
from tuner.models.kv_cache import numbers_per_token
from tuner.models.load import check_precision, load_model_config, load_tokenizer
from tuner.models.load_roles import check_critic_adapter, check_language, is_on_one_base, without_adapter
from tuner.models.locate import Location, locate
from tuner.models.memory import NF4_BYTES, Weights, peak_bytes
from tuner.models.rope import describe_rope
from tuner.models.tiny import tiny_model_folder
from tuner.resources import PREFIX, row_examples_folder
from tuner.stages.dpo.plan import plan_pairs
from tuner.stages.rows import all_warm_up, load_rows, packed, plan, plan_run, reward_reader


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
    location = locate(config.model, weights=False)
    check_precision(location, config.precision)
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
    if isinstance(config, PackedConfig):
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
    planned, lengths = plan_pairs(config, len(data.train.better)), data.train.sequences.lengths
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

    stands_in: the reward model is a small one that nobody taught: what it was trained on is not known.
    """
    load_rule(config.evaluation.rule)
    shape = load_model_config(config.policy)
    policy, reward = (
        locate(model, config.precision, weights=False) for model in (config.policy, config.reward)
    )
    one_base = stands_in or is_on_one_base(_identified(policy, reward), reward)
    check_precision(policy, config.precision)
    check_precision(reward, config.precision)
    if not stands_in:
        check_language(config, policy, reward)
        check_critic_adapter(config, policy, reward)
    adapter = config.adapter or policy.lora
    if config.roles == "shared" and adapter is None and policy.adapter_folder is None:
        raise UserError(without_adapter(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, trust_remote_code=config.policy.trust_remote_code)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.requires_grad_(adapter is None)
    counted = Weights.of(add_adapter(model, adapter, config.seed) if adapter else model)
    tokenizer = load_tokenizer(config.policy)
    prompts = load_prompts(config.prompts, tokenizer, None if stands_in else reward_reader(config))
    replay = None if config.replay is None else load_data(config.replay.data, tokenizer)
    stream = plan_run(config, prompts)
    steps = min(len(stream), config.max_steps or len(stream))
    asked = steps * (float(prompts.train.lengths.mean()) + config.sampling.max_new_tokens)
    answered = min(config.prompts_per_step, stream.drawn)
    return Checked(
        family=type(model).__name__,
        parameters=parameters,
        trained=2 * counted.trained,
        rope=describe_rope(shape),
        data="; ".join(str(part.report) for part in (prompts, replay) if part is not None),
        steps=steps,
        tokens=round(asked * answered),
        passes=None,
        fill=answered / config.prompts_per_step,
        peak_gib=_policy_peak(config, shape, counted, policy, None if one_base else reward) / 2**30,
        replaced=replaced,
        warnings=(*_two_bases(config, one_base), *all_warm_up(config, steps)),
    )


def _identified(policy: Location, reward: Location) -> Location:
    """The policy with its base's fingerprint; without its weights here, that of the reward model's, if so called."""
    base, folder = policy.reference, policy.base_folder
    if base.fingerprint:
        return policy
    if any(folder.glob("*.safetensors")):
        found = fingerprint(folder)
    else:
        found = reward.reference.fingerprint if base.path == reward.reference.path else ""
    return replace(policy, reference=replace(base, fingerprint=found))


def _two_bases(config: PPO, one_base: bool) -> list[str]:
    if one_base or config.roles == "separate":
        return []
    return [
        "policy and reward model stand on two bases, which are both held: they differ, or in quantization, rope or "
        "precision, or the reward model is no adapter"
    ]


def _policy_peak(
    config: PPO, shape: Any, weights: Weights, policy: Location, reward: Location | None
) -> float:
    """Estimated peak: the policy's as in SFT, the critic's state, the frozen roles, and the cache of answers.

    reward: where the reward model lies, if it stands on another base; taken to be as large.
    """
    trained = replace(weights, trained=2 * weights.trained)
    frozen = 2 if config.precision == "bf16" else 4
    longest = config.prompts_per_step * (config.prompts.max_length + config.sampling.max_new_tokens)
    cache = min(config.sampling.cache_gib * 2**30, longest * numbers_per_token(shape) * frozen)
    peak = peak_bytes(config, shape, trained, policy.reference.quantization, cache)
    adapters = 4 * weights.trained
    if (
        config.roles == "separate"
    ):  # beside the policy: critic, reference (held as the policy is), reward model
        elsewhere = [policy if config.critic_from == "policy" else reward or policy, policy, reward or policy]
        full = config.adapter is None and policy.adapter_folder is None
        kept = adapters + (frozen * weights.trained if full else adapters)
        return peak + kept + sum(_base_bytes(weights, one, frozen) for one in elsewhere)
    return peak + 2 * adapters + (0 if reward is None else _base_bytes(weights, reward, frozen))


def _base_bytes(weights: Weights, location: Location, plain: int) -> float:
    """Memory of a frozen base."""
    held = {None: plain, "nf4": NF4_BYTES, "int8": 1}[location.reference.quantization]
    return weights.linear * held + weights.other * plain


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
