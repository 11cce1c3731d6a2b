"""No setting is ignored in silence: every field of every part changes something that can be seen, or is an error.

Each is changed alone, in a run of a few steps of a model of one layer, and compared with the same run without the
change. The tables must name every field there is: a new one without an entry fails the first test.
"""

import hashlib
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP

import tuner
import tuner.config
from tests.bounds import STEADY_EPS
from tests.shallow_models import first_layers
from tuner.config import (
    PPO,
    SFT,
    AdamW,
    Chat,
    Checkpoint,
    Evaluation,
    LoRA,
    Model,
    PackedConfig,
    PairEvaluation,
    PolicyEvaluation,
    Preferences,
    Prompts,
    Replay,
    RewardModel,
    Sampling,
    TrainingConfig,
    Wandb,
    override,
    to_json,
)
from tuner.config.base import ConfigBase
from tuner.errors import UserError
from tuner.resources import locate
from tuner.stages.run import Run

BASE = SFT(
    name="fields",
    model=Model(path="one_layer"),
    adapter=LoRA(r=4),
    data=Chat(
        files=("one.jsonl", "two.jsonl"),
        test_files=("held_out.jsonl",),
        validation_files=("held_out.jsonl",),
        template="internlm2",
        max_length=64,
    ),
    optimizer=AdamW(lr=5e-3),
    tokens_per_step=256,
    tokens_per_pass=256,
    max_steps=2,
    precision="fp32",
    gradient_checkpointing=False,
    device="cpu",
    evaluation=Evaluation(every=2, samples=1, max_new_tokens=4, rows=2),
    checkpoint=Checkpoint(every=2, keep=2),
)


REWARD = RewardModel(
    **{name: getattr(BASE, name) for name in TrainingConfig.model_fields},
    model=BASE.model,
    adapter=BASE.adapter,
    conditions={"right": ("Right sums win.", "The true sum wins."), "short": "Short answers win."},
    data=Preferences(
        files=("pairs.jsonl",),
        test_files=("held_out_pairs.jsonl",),
        validation_files=("held_out_pairs.jsonl",),
        template="internlm2",
        max_length=96,
    ),
    tokens_per_step=512,
    tokens_per_pass=512,
    evaluation=PairEvaluation(every=2, rows=4, worst=1),
)

POLICY = PPO(
    name="fields",
    policy=Model(path="runs/policy"),
    reward=Model(path="runs/reward"),
    prompts=Prompts(
        files=("prompts.jsonl", "more_prompts.jsonl"),
        test_files=("held_out_prompts.jsonl",),
        template="internlm2",
        max_length=128,
    ),
    prompts_per_step=8,
    sampling=Sampling(max_new_tokens=10),
    update_epochs=2,
    critic_warmup=1,
    critic_lr=5e-3,
    replay=Replay(
        files=("one.jsonl", "two.jsonl"),
        test_files=("held_out.jsonl",),
        template="internlm2",
        max_length=128,
    ),
    optimizer=AdamW(lr=5e-3),
    tokens_per_pass=512,
    epochs=2.0,
    max_steps=2,
    precision="fp32",
    gradient_checkpointing=False,
    device="cpu",
    evaluation=PolicyEvaluation(every=2, rows=2, samples=1, rule="rules.py:gold"),
)


@dataclass(frozen=True)
class Change:
    """What is changed, what it is compared with, and where the difference must be seen."""

    to: dict[str, Any]
    seen: str
    base: dict[str, Any] = field(default_factory=dict)
    stage: PackedConfig | PPO = BASE
    alike: bool = False
    """Whether all that is learned must stay as it was, but for rounding."""


ONE_EPOCH = {"max_steps": None, "data.limit": 8}
FOUR_LAYERS = {"model.path": "tuner:tiny"}
ROPE = {"model.rope": {"scaling": "linear", "factor": 2.0}}
SHORT = {"data.short_rows": {"below": 37, "share": 0.9}}
TO_LENGTH = {"model.rope": {"scaling": "linear", "length": 4_096}}
LONG_ROPE = {"model.rope": {"scaling": "longrope", "factor": 2.0, "long_factors": [2.0] * 24}}
TEXT = {
    "data": {"kind": "text", "files": ["text.jsonl"], "max_length": 64},
    "evaluation.samples": 0,
    "max_steps": 2,
}
KINDS = {
    kind: {"schedule": {"kind": kind.lower(), "warmup": 0.0}, "max_steps": 3}
    for kind in ("Cosine", "Linear", "Constant")
}
SCHEDULES = {
    kind: {"schedule": {"kind": kind.lower(), "warmup": 2.0}, "max_steps": 4}
    for kind in ("Cosine", "Linear", "Constant")
}


def source(**changes: Any) -> dict[str, Any]:
    return {"data.files": [{"path": "one.jsonl", **changes}, "two.jsonl"]}


def asked(**changes: Any) -> dict[str, Any]:
    return {"prompts.files": [{"path": "prompts.jsonl", **changes}, "more_prompts.jsonl"]}


STEADY = {"optimizer.eps": STEADY_EPS}
"""For what is learned alike though sums are ordered otherwise."""


def ppo(to: dict[str, Any], seen: str, base: dict[str, Any] | None = None, alike: bool = False) -> Change:
    return Change(to, seen, base or {}, POLICY, alike)


FRESH = {"policy": {"path": "one_layer"}, "adapter": {"r": 4}, "roles": "separate", "critic_from": "policy"}
UNSHAPED = {"reward_clip": None, "normalize_rewards": False}
AT_ONCE = {"critic_warmup": 0}
"""The policy learns in the first step, so that it has left its reference in the second."""
ADAPTIVE = {"kl": {"target": 1e-3, "horizon": 8}, "reference": {"path": "one_layer"}, **AT_ONCE}
"""From a reference that is far from the policy, so that its KL is above one target and below another."""
PPO_CHANGES = {
    "PolicyConfig.policy": ppo(FRESH, "losses", {"roles": "separate", "critic_from": "policy"}),
    "PolicyConfig.adapter": ppo({"adapter.r": 8}, "weights", FRESH),
    "PolicyConfig.reward": ppo({"reward.path": "other_reward"}, "score"),
    "PolicyConfig.reference": ppo({"reference": {"path": "one_layer"}}, "kl"),
    "PolicyConfig.roles": ppo({"roles": "separate"}, "roles", STEADY, alike=True),
    "PPO.critic_from": ppo({"critic_from": "policy"}, "value"),
    "PPO.critic_adapter": ppo({"critic_adapter": {"r": 8}}, "trained", FRESH),
    "PolicyConfig.prompts_per_step": ppo({"prompts_per_step": 4}, "prompts"),
    "PolicyConfig.kl": ppo({"kl": 1.0}, "reward", AT_ONCE),
    **{
        f"AdaptiveKL.{name}": ppo({f"kl.{name}": value}, "kl_coefficient", ADAPTIVE)
        for name, value in {"target": 1e3, "horizon": 16, "initial": 0.5}.items()
    },
    "PolicyConfig.entropy_bonus": ppo({"entropy_bonus": 0.1}, "entropy_loss"),
    "PPO.value_gae_lambda": ppo({"value_gae_lambda": 0.5}, "value_loss"),
    "PPO.critic_updates": ppo({"critic_updates": 2}, "value_loss"),
    "PolicyConfig.kl_estimator": ppo({"kl_estimator": "k3"}, "reward", AT_ONCE),
    "PPO.gamma": ppo({"gamma": 0.5}, "value_loss"),
    "PPO.gae_lambda": ppo({"gae_lambda": 0.5}, "value_loss"),
    "PolicyConfig.clip": ppo({"clip": 1e-4}, "clipped"),
    "PPO.value_clip": ppo({"value_clip": 1e-3}, "value_loss"),
    "PPO.whiten_advantages": ppo({"whiten_advantages": True}, "policy_loss"),
    "PolicyConfig.reward_clip": ppo({"reward_clip": 1e-6}, "reward"),
    "PolicyConfig.normalize_rewards": ppo({"normalize_rewards": False}, "reward"),
    "PolicyConfig.preference_reward": ppo({"preference_reward": {}}, "reward", UNSHAPED),
    "PolicyConfig.missing_end_penalty": ppo(
        {"missing_end_penalty": 1.0}, "reward", {"normalize_rewards": False}
    ),
    "PolicyConfig.added_rewards": ppo({"added_rewards": ["rules.py:gold"]}, "score_of/gold"),
    "Rule.weight": ppo(
        {"added_rewards": [{"function": "rules.py:other", "weight": 3.0}]},
        "score",
        {"added_rewards": ["rules.py:other"]},
    ),
    "PolicyConfig.length_penalty": ppo({"length_penalty": {"per_token": 0.5}}, "reward"),
    "LengthPenalty.per_token": ppo(
        {"length_penalty.per_token": 0.5}, "reward", {"length_penalty": {"per_token": 0.1}}
    ),
    "LengthPenalty.above": ppo(
        {"length_penalty.above": 4},
        "reward",
        {"length_penalty": {"per_token": 0.1}, "normalize_rewards": False},
    ),
    "PolicyConfig.mask_truncated": ppo(
        {"mask_truncated": True}, "policy_loss", {"sampling.max_new_tokens": 6}
    ),
    "PolicyConfig.update_epochs": ppo({"update_epochs": 1}, "ratio"),
    "PolicyConfig.mini_batches": ppo({"mini_batches": 2}, "ratio"),
    "PPO.critic_warmup": ppo({"critic_warmup": 0}, "lr_policy"),
    "PPO.critic_lr": ppo({"critic_lr": 1e-3}, "lr_critic"),
    "PolicyConfig.replay": ppo({"replay": None}, "replay_loss"),
    "PolicyConfig.tokens_per_pass": ppo({"tokens_per_pass": 144}, "forward passes", STEADY, alike=True),
    "Prompts.files": ppo({"prompts.files": ["prompts.jsonl"]}, "data"),
    "Prompts.test_files": ppo({"prompts.test_files": ["more_prompts.jsonl"]}, "results"),
    "Prompts.validation_files": ppo({"prompts.validation_files": ["more_prompts.jsonl"]}, "error"),
    "Prompts.template": ppo({"prompts.template": "alpaca"}, "tokens", {"critic_from": "policy"}),
    "Prompts.system": ppo({"prompts.system": "You add."}, "tokens"),
    "Prompts.max_length": ppo({"prompts.max_length": 24}, "data"),
    "Source.system": ppo(asked(system="You add."), "tokens"),
    "Replay.files": ppo({"replay.files": ["one.jsonl"]}, "data"),
    "Replay.test_files": ppo({"replay.test_files": ["two.jsonl"]}, "results"),
    "Replay.validation_files": ppo({"replay.validation_files": ["two.jsonl"]}, "error"),
    "Replay.split": ppo({"replay.split": {"test": 0.3}}, "data"),
    "Replay.template": ppo({"replay.template": "alpaca"}, "replay_loss"),
    "Replay.max_length": ppo({"replay.max_length": 8}, "error"),
    "Replay.too_long": ppo(
        {"replay.too_long": "drop"}, "data", {"replay.max_length": 31, "replay.too_long": "cut"}
    ),
    "Replay.coefficient": ppo({"replay.coefficient": 0.1}, "grad_norm_policy"),
    "Replay.ratio": ppo({"replay.ratio": 1.0}, "replay_loss"),
    "Sampling.max_new_tokens": ppo({"sampling.max_new_tokens": 4}, "length"),
    "Sampling.temperature": ppo({"sampling.temperature": 0.5}, "entropy"),
    "Sampling.top_p": ppo({"sampling.top_p": 0.1}, "score"),
    "Sampling.top_k": ppo({"sampling.top_k": 1}, "score"),
    "Sampling.min_new_tokens": ppo({"sampling.min_new_tokens": 9}, "length"),
    "Sampling.stop": ppo({"sampling.stop": ["=", "+"]}, "length"),
    "Sampling.cache_gib": ppo({"sampling.cache_gib": 1e-6}, "forward passes", STEADY, alike=True),
    "PolicyEvaluation.samples": ppo({"evaluation.samples": 2}, "samples"),
    "PolicyEvaluation.recorded_answers": ppo({"evaluation.recorded_answers": 5}, "rollouts"),
    "PolicyEvaluation.rule_on_rollouts": ppo({"evaluation.rule_on_rollouts": False}, "gold"),
    "PolicyEvaluation.rule": ppo({"evaluation.rule": "rules.py:other"}, "results"),
    "PolicyEvaluation.temperature": ppo({"evaluation.temperature": 5.0}, "samples"),
}
"""A change of PPO's own."""

AGAIN = {
    "TrainingConfig.epochs": ppo({"epochs": 0.5}, "prompts", {"max_steps": 2}),
    "TrainingConfig.max_grad_norm": ppo({"max_grad_norm": 1e-3}, "weights"),
    "TrainingConfig.precision": ppo({"precision": "bf16"}, "generator_gap"),
    "TrainingConfig.gradient_checkpointing": ppo(
        {"gradient_checkpointing": True}, "forward passes", STEADY, alike=True
    ),
    "TrainingConfig.mlp_tile": ppo({"mlp_tile": 32}, "forward passes", STEADY, alike=True),
    "StageConfig.seed": ppo({"seed": 1}, "tokens"),
    "TrainingConfig.schedule": ppo({"schedule": {"kind": "linear", "warmup": 0.0}}, "lr_policy", AT_ONCE),
    "HeldOutEvaluation.every": ppo({"evaluation.every": 1}, "eval_score"),
    "HeldOutEvaluation.rows": ppo({"evaluation.rows": 3}, "results"),
    "Prompts.split": ppo({"prompts.split": {"test": 0.3}}, "data"),
    "Prompts.limit": ppo({"prompts.limit": 9}, "data"),
    "Source.condition": ppo(asked(condition="short"), "score"),
    "Source.limit": ppo(asked(limit=5), "data"),
    "Source.weight": ppo(asked(weight=3.0), "error"),
    "Source.share": ppo(
        {
            "prompts.files": [
                {"path": "prompts.jsonl", "share": 5.0},
                {"path": "more_prompts.jsonl", "share": 1.0},
            ]
        },
        "tokens",
    ),
}
"""What other stages have as well, and PPO reads by code of its own."""

SEEN = {
    "StageConfig.name": Change({"name": "other"}, "folder"),
    "PackedConfig.tokens_per_step": Change({"tokens_per_step": 512}, "tokens"),
    "PackedConfig.tokens_per_pass": Change({"tokens_per_pass": 64}, "passes"),
    "TrainingConfig.epochs": Change({"epochs": 2.0}, "tokens", ONE_EPOCH),
    "StageConfig.max_steps": Change({"max_steps": 1}, "losses"),
    "TrainingConfig.max_grad_norm": Change({"max_grad_norm": 1e-3}, "weights"),
    "TrainingConfig.precision": Change({"precision": "bf16"}, "losses"),
    "TrainingConfig.gradient_checkpointing": Change({"gradient_checkpointing": True}, "forward passes"),
    "TrainingConfig.memory": Change({"memory": "2GiB"}, "forward passes", {"gradient_checkpointing": True}),
    "TrainingConfig.mlp_tile": Change({"mlp_tile": 64}, "forward passes"),
    "TrainingConfig.kernels": Change({"kernels": ["liger"]}, "error"),  # without CUDA
    "TrainingConfig.device": Change({"device": "cuda"}, "place"),
    "Parallel.shard": Change({"parallel.shard": 2}, "error"),  # of a single process
    "Parallel.sequence": Change({"parallel.sequence": 2}, "error"),
    "TrainingConfig.deterministic": Change({"deterministic": True}, "deterministic"),
    "StageConfig.seed": Change({"seed": 1}, "losses"),
    "AdamW.lr": Change({"optimizer.lr": 1e-3}, "weights"),
    "AdamW.betas": Change({"optimizer.betas": [0.5, 0.9]}, "weights"),
    "AdamW.eps": Change({"optimizer.eps": 1e-2}, "weights"),
    "AdamW.weight_decay": Change({"optimizer.weight_decay": 0.5}, "weights"),
    "AdamW.bits": Change({"optimizer.bits": 8}, "optimiser"),
    "Cosine.kind": Change(KINDS["Linear"], "lr", KINDS["Cosine"]),
    "Linear.kind": Change(KINDS["Constant"], "lr", KINDS["Linear"]),
    "Constant.kind": Change(KINDS["Cosine"], "lr", KINDS["Constant"]),
    **{
        f"{kind}.{name}": Change({f"schedule.{name}": value}, "lr", base)
        for kind, base in SCHEDULES.items()
        for name, value in (("warmup", 0.0), ("warmup_start", 0.5), ("final", 0.5))
        if (kind, name) != ("Constant", "final")
    },
    "HeldOutEvaluation.every": Change({"evaluation.every": 1}, "validation"),
    "Evaluation.samples": Change({"evaluation.samples": 2}, "samples"),
    "Evaluation.max_new_tokens": Change({"evaluation.max_new_tokens": 8}, "samples"),
    "Evaluation.score": Change({"evaluation.score": "exact"}, "results"),
    "HeldOutEvaluation.rows": Change({"evaluation.rows": 3}, "validation"),
    "Checkpoint.every": Change({"checkpoint.every": 1}, "checkpoints"),
    "Checkpoint.keep": Change({"checkpoint.keep": 1}, "checkpoints", {"checkpoint.every": 1}),
    "Model.path": Change({"model.path": "other_model"}, "losses"),
    "Model.revision": Change({"model.revision": "v2"}, "error"),
    "Model.quantization": Change({"model.quantization": "nf4"}, "losses"),
    "Rope.base": Change({"model.rope": {"base": 5_000.0}}, "losses"),
    "Rope.scaling": Change({"model.rope.scaling": "yarn"}, "losses", ROPE),
    "Rope.factor": Change({"model.rope.factor": 4.0}, "losses", ROPE),
    "Rope.length": Change({"model.rope.length": 8_192}, "losses", TO_LENGTH),
    "Rope.long_factors": Change({"model.rope.long_factors": [4.0] * 24}, "losses", LONG_ROPE),
    "Rope.mixed_window": Change({"model.rope.mixed_window": True}, "losses", ROPE),
    "LoRA.r": Change({"adapter.r": 8}, "weights"),
    "LoRA.alpha": Change({"adapter.alpha": 32.0}, "losses"),
    "LoRA.dropout": Change({"adapter.dropout": 0.5}, "losses"),
    "LoRA.targets": Change({"adapter.targets": ["q_proj"]}, "weights"),
    "LoRA.train_whole": Change({"adapter.train_whole": ["lm_head"]}, "weights"),
    "LoRA.target_parameters": Change({"adapter.target_parameters": ["experts.down_proj"]}, "error"),
    "Freeze.all_but_last_layers": Change({"freeze": {"all_but_last_layers": 1}}, "weights", FOUR_LAYERS),
    "Freeze.names": Change({"freeze": {"names": ["*layers.0*"]}}, "weights", FOUR_LAYERS),
    "Chat.kind": Change(TEXT, "data"),
    "Chat.files": Change({"data.files": ["one.jsonl"]}, "data"),
    "Chat.validation_files": Change({"data.validation_files": ["two.jsonl"]}, "validation"),
    "Chat.test_files": Change({"data.test_files": ["two.jsonl"]}, "results"),
    "Chat.max_length": Change({"data.max_length": 8}, "error"),
    "Chat.duplicates": Change({"data.duplicates": "drop"}, "data", {"data.files": ["one.jsonl", "one.jsonl"]}),
    "Chat.limit": Change({"data.limit": 9}, "data"),
    "Chat.cache": Change({"data.cache": "cache"}, "cache"),
    "Chat.template": Change({"data.template": "alpaca"}, "losses", {"data.max_length": 128}),
    "Chat.system": Change({"data.system": "You add."}, "data"),
    "Chat.learn": Change({"data.learn": "all"}, "losses"),
    "Chat.too_long": Change(
        {"data.too_long": "drop"}, "data", {"data.max_length": 31, "data.too_long": "cut", "max_steps": 1}
    ),
    "Text.kind": Change({"data": BASE.data.model_dump(mode="json")}, "data", TEXT),
    "Text.too_long": Change(
        {"data.too_long": "cut"}, "data", {**TEXT, "data": {**TEXT["data"], "max_length": 16}}  # type: ignore[dict-item]
    ),
    "Split.validation": Change({"data.split": {"validation": 0.3}}, "data"),
    "Split.test": Change({"data.split": {"test": 0.3}}, "data"),
    "Source.path": Change(source(path="text.jsonl"), "error"),
    "Source.shape": Change(source(shape="alpaca"), "error"),
    "Source.split": Change(source(split="test"), "error"),
    "Source.subset": Change(source(subset="en"), "error"),
    "Source.share": Change(
        {"data.files": [{"path": "one.jsonl", "share": 5.0}, {"path": "two.jsonl", "share": 1.0}]},
        "losses",
        {"data.files": [{"path": "one.jsonl", "share": 1.0}, {"path": "two.jsonl", "share": 1.0}]},
    ),
    "ShortRows.below": Change({"data.short_rows.below": 39}, "losses", SHORT),
    "ShortRows.share": Change({"data.short_rows.share": 0.1}, "losses", SHORT),
    "Source.weight": Change(source(weight=3.0), "losses"),
    "Source.limit": Change(source(limit=5), "data"),
    "Source.condition": Change(
        {"data.files": [{"path": "pairs.jsonl", "condition": "short"}]}, "data", stage=REWARD
    ),
    **{
        name: Change(to, seen, base, REWARD)
        for name, to, seen, base in (
            ("RewardModel.conditions", {"conditions.right": "Correct sums win."}, "data", {}),
            ("RewardModel.reward_token", {"reward_token": "</s>"}, "data", {}),
            ("FocalRanking.gamma", {"loss.gamma": 0.0}, "losses", {"loss.margin": 0.0}),
            ("FocalRanking.penalty", {"loss.penalty": "square"}, "losses", {}),
            ("FocalRanking.bound", {"loss.bound": 3.0}, "losses", {}),
            ("FocalRanking.barrier", {"loss.barrier": 0.5}, "losses", {}),
            ("FocalRanking.margin", {"loss.margin": 0.0}, "losses", {}),
            ("PairEvaluation.worst", {"evaluation.worst": 0}, "report", {"data.test_files": ["swapped.jsonl"]}),
            ("Preferences.files", {"data.files": ["held_out_pairs.jsonl"]}, "data", {}),
            ("Preferences.template", {"data.template": "alpaca"}, "data", {}),
            ("Preferences.max_length", {"data.max_length": 8}, "error", {}),
            ("Preferences.too_long", {"data.too_long": "drop"}, "data",
             {"data.max_length": 38, "data.too_long": "cut"}),
            ("Preferences.incomparable", {"data.incomparable": "error"}, "error",
             {"data.files": ["pairs.jsonl", "same.jsonl"], "data.incomparable": "drop"}),
            ("Preferences.ties", {"data.ties": "half"}, "data", {"data.files": ["pairs.jsonl", "tied.jsonl"]}),
        )
    },
    **PPO_CHANGES,
}  # fmt: skip

ELSEWHERE = {
    "PackedConfig.max_bad_steps": "test_acting.py::test_bad_steps_are_skipped_and_too_many_end_the_run",
    "PackedConfig.evaluation": "a part: its fields are here",
    "StageConfig.checkpoint": "a part: its fields are here",
    "Checkpoint.skip_damaged": "tests/equivalence/test_resume.py::test_a_flipped_bit_is_never_trained_on",
    "Checkpoint.milestones": "tests/equivalence/test_milestones.py::test_a_milestone_is_the_model_of_its_step",
    "TrainingConfig.optimizer": "a part: its fields are here",
    "TrainingConfig.schedule": "a part: its fields are here",
    "TrainingConfig.parallel": "a part: its fields are here",
    "StageConfig.tracking": "test_a_tracker_looks_on_where_the_config_names_one",
    "SFT.stage": "has one legal value; tells stages apart in JSON: test_configs.py::test_json_both_ways",
    "SingleModelConfig.model": "a part: its fields are here",
    "SingleModelConfig.adapter": "fields are here; None is full weights: tests/equivalence/test_same_result.py",
    "PackedConfig.freeze": "a part: its fields are here",
    "PackedConfig.data": "a part: its fields are here",
    "AdamW.paged": "acts on GPUs only: tests/unit/training/test_optimizers.py sees the class it makes",
    "Validation.patience": "test_acting.py::test_early_stopping_and_the_best_checkpoint",
    "Validation.keep_best": "test_acting.py::test_early_stopping_and_the_best_checkpoint",
    "Model.rope": "a part: its fields are here",
    "Model.resize_embeddings": "needs a longer tokenizer: tests/unit/models/test_families.py",
    "Model.trust_remote_code": "needs a checkpoint with code: tests/unit/models/test_tokenizer.py",
    "Chat.split": "a part: its fields are here",
    "Chat.short_rows": "a part: its fields are here",
    "Text.short_rows": "one code for both kinds of data: seen for Chat",
    "Chat.changed_turns": "tests/unit/data/test_lost_content.py::test_every_turn_is_learned_as_it_is_generated",
    **{
        f"{kind}.drop": "tests/unit/data/test_lost_content.py sees it for every kind of data"
        for kind in ("Chat", "Preferences", "Prompts", "Replay")
    },
    **{
        f"{kind}.spelled_tokens": "tests/unit/data/test_control_tokens.py sees it for every kind of data"
        for kind in ("Chat", "Text", "Preferences", "Prompts", "Replay")
    },
    **{
        f"Text.{name}": "one code for both kinds of data: seen for Chat"
        for name in (
            *("files", "validation_files", "test_files", "max_length", "split"),
            *("duplicates", "limit", "cache"),
        )
    },
    "RewardModel.stage": "has one legal value, as SFT's",
    "RewardModel.loss": "a part: its fields are here",
    **{
        f"Preferences.{name}": "one code for every kind of data: seen for Chat"
        for name in ("validation_files", "test_files", "split", "duplicates", "limit", "cache")
    },
    "Preferences.kind": "has one legal value; tells kinds apart in JSON",
    **{
        f"{kind.__name__}.{name}": f"tests/end_to_end/test_{kind.__name__.lower()}.py"
        for kind in (tuner.config.DPO, tuner.config.KTO)
        for name in kind.model_fields.keys() - tuner.config.SingleModelConfig.model_fields.keys()
    },
    "PPO.stage": "has one legal value, as SFT's",
    "GRPO.stage": "has one legal value, as SFT's",
    "RLOO.stage": "has one legal value, as SFT's",
    "Rule.function": "tests/equivalence/test_group_algorithms.py::test_a_rule_is_a_reward",
    **{
        f"{name}.{field}": "tests/equivalence/test_group_algorithms.py::test_every_field_changes_the_run"
        for name, fields in (
            ("GRPO", ("answers_per_prompt", "scale_advantages", "clip_high", "normalization")),
            ("RLOO", ("answers_per_prompt",)),
        )
        for field in fields
    },
    "PolicyConfig.prompts": "a part: its fields are here",
    "PolicyConfig.alarms": "a part: its fields are here",
    "Alarms.exploits": "tests/equivalence/test_alarms.py::test_the_model_is_that_of_the_last_sound_checkpoint",
    "Alarms.kl": "test_acting.py::test_an_alarm_ends_the_run_and_says_so",
    "Alarms.ended": "test_acting.py::test_an_alarm_ends_the_run_and_says_so",
    "PolicyConfig.max_kl": "test_acting.py::test_too_high_a_kl_ends_the_run_and_says_so",
    "PolicyEvaluation.keep_best": "test_acting.py::test_the_policy_that_scored_best_is_the_model",
    "PolicyConfig.sampling": "a part: its fields are here",
    "PolicyConfig.engine": "needs a server: tests/equivalence/test_vllm_runs.py",
    **{
        f"VLLM.{name}": f"needs a server: tests/{file}"
        for file, names in (
            ("equivalence/test_vllm_runs.py", ("url", "max_gap", "above_max_gap", "max_weight", "python")),
            ("unit/rollout/test_vllm_server.py", ("arguments",)),
            ("unit/rollout/test_vllm_engine.py", ("retries", "patience")),
            ("unit/rollout/test_vllm_client.py", ("timeout", "concurrency")),
        )
        for name in names
    },
    **{
        f"PolicyConfig.{name}": "needs reward models with statistics: tests/equivalence/test_ensemble.py"
        for name in ("further_rewards", "combine", "variance_coefficient")
    },
    **{
        f"PreferenceReward.{name}": "tests/unit/rollout/test_ensemble.py::test_a_preference_is_the_mean_of_sigmoids"
        for name in ("answers", "slope")
    },
    "COOL.stage": "has one legal value, as SFT's",
    **{
        f"COOL.{name}": "a part: its fields are here"
        for name in ("reward", "policy", "rounds", "candidates", "feedback")
    },
    "COOL.merge": "tests/equivalence/test_cool.py::test_two_rounds",
    "Round.patch": "a part: its fields are here",
    **{
        f"{kind}.{name}": "tests/unit/stages/test_rounds.py"
        for kind, names in (
            ("Round", ("steps", "start")),
            ("Patch", ("start", "original", "weight", "steps", "epochs", "lr", "held_out", "average")),
            ("Patch", ("max_accuracy_loss", "min_margin")),
            ("Candidates", ("prompts", "answers", "slow", "fast", "patterns", "minimal")),
        )
        for name in names
    },
    "Patch.contradicting": "tests/unit/stages/test_rounds.py::test_original_rows_against_the_labels_are_left_out",
    "Patch.on_loss": "tests/equivalence/test_cool_people.py::test_a_costly_patch_is_refused_or_rolled_back",
    **{
        f"People.{name}": "tests/unit/cli/test_label.py and tests/equivalence/test_cool_people.py"
        for name in ("kind", "overlap", "order", "repeats", "wait")
    },
    **{
        f"RuleFeedback.{name}": "tests/unit/feedback/test_labelers.py"
        for name in ("kind", "name", "function")
    },
    **{
        f"Judge.{name}": "tests/unit/feedback/test_judge.py asks a server"
        for name in tuner.config.Judge.model_fields
    },
    "PolicyConfig.evaluation": "a part: its fields are here",
    "PolicyConfig.max_bad_steps": "test_acting.py::test_ppo_skips_bad_updates_and_too_many_bad_steps_end_the_run",
    "Prompts.kind": "has one legal value; tells kinds apart in JSON",
    "Replay.kind": "has one legal value; tells kinds apart in JSON",
    "Prompts.split": "test_ppo_reads_it_too",
    "Prompts.limit": "test_ppo_reads_it_too",
    **{
        f"{kind}.{name}": "one code for every kind of data: seen for Chat"
        for kind, names in (
            ("Prompts", ("duplicates", "cache")),
            ("Replay", ("duplicates", "limit", "cache")),
        )
        for name in names
    },
    **{
        f"Wandb.{name}": "tests/unit/training/test_wandb_tracker.py reads it from wandb's own files"
        for name in ("project", "entity", "group", "job_type", "tags", "notes", "mode", "x_axis")
    },
}


def all_fields() -> set[str]:
    """ "Class.field" of every part a config may hold, under the class that first has it where its heirs do too."""
    parts = [
        part for _, part in inspect.getmembers(tuner.config, inspect.isclass) if issubclass(part, ConfigBase)
    ]
    return {f"{owner(part, name).__name__}.{name}" for part in parts for name in part.model_fields}


def owner(part: type[ConfigBase], name: str) -> type[ConfigBase]:
    """The first of a class's public ancestors, or itself, that has the field."""
    public = [one for one in part.__mro__ if hasattr(tuner.config, one.__name__)]
    return next(one for one in reversed(public) if name in getattr(one, "model_fields", {}))


def test_every_field_has_an_entry() -> None:
    assert all_fields() == SEEN.keys() | ELSEWHERE.keys()
    assert not SEEN.keys() & ELSEWHERE.keys()


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working directory with rows, and a model that is a little different."""
    folder = tmp_path_factory.mktemp("fields")
    rows = Path(locate("tuner:sums/train.jsonl")).read_text(encoding="utf-8").splitlines()
    for name, chosen in (("one", rows[:30]), ("two", rows[30:60]), ("held_out", rows[60:66])):
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n")
    text = "".join(
        json.dumps({"text": f"{number} and {number} are {2 * number}, " * 3}) + "\n" for number in range(30)
    )
    (folder / "text.jsonl").write_text(text)
    pairs = [
        {
            "prompt": f"What is {n} + 2? Think well.",
            "chosen": f"{n + 2}",
            "rejected": f"{n + 3}",
            "margin": 0.5,
        }
        | ({"condition": "right" if n % 2 else "short"} if n % 3 else {})
        for n in range(40)
    ]
    tied = [row | {"score_chosen": 1.0, "score_rejected": 1.0} for row in pairs]
    same = [row | {"rejected": row["chosen"]} for row in pairs]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    files = {
        "pairs": pairs[:30],
        "held_out_pairs": pairs[30:],
        "tied": tied,
        "same": same[:1],
        "swapped": swapped,
    }
    for name, chosen in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    prompts = [
        {"prompt": f"What is {n} + 2?" + " Think well." * (n % 2), "reference": f"{n} + 2 = {n + 2}"}
        | ({"condition": "right"} if n % 3 else {})
        for n in range(26)
    ]
    for name, chosen in (
        ("prompts", prompts[:12]), ("more_prompts", prompts[12:20]), ("held_out_prompts", prompts[20:])
    ):  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    (folder / "rules.py").write_text(
        "def gold(answer, row):\n    return float(row['reference'] in answer)\n\n\n"
        "def other(answer, row):\n    return 1 / (1 + len(answer))\n"
    )
    base = first_layers(folder / "one_layer", 1)
    other = Path(shutil.copytree(base, folder / "other_model")) / "model.safetensors"
    weights = load_file(other)
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 2}, other, {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def roles(_folder: None) -> None:
    """What PPO starts from: a policy, a reward model, and another that scores otherwise."""
    quiet = {
        "evaluation.every": 3,
        "checkpoint.every": None,
        "data.test_files": [],
        "data.validation_files": [],
    }
    tuner.train(override(BASE, {**quiet, "name": "policy", "epochs": 9.0, "max_steps": 40}))
    tuner.train(override(REWARD, {**quiet, "name": "reward", "max_steps": 3}))
    other = Path(shutil.copytree("runs/reward/model", "other_reward")) / "adapter_model.safetensors"
    weights = load_file(other)
    save_file({**weights, SCORE: weights[SCORE] * -2}, other, {"format": "pt"})


Observed = dict[str, Any]
Look = Callable[..., Observed]
SCORE = "base_model.model.score.weight"
ALIKE = (
    "loss",
    "policy_loss",
    "value_loss",
    "replay_loss",
    "grad_norm_policy",
    "grad_norm_critic",
    "score",
    "kl",
)
OF_THE_FIRST_STEP = {
    *("data", "cache", "deterministic", "results", "rollouts"),
    *("prompts", "tokens", "trained", "length", "entropy", "score", "score_of/gold", "gold"),
}
"""What the first step shows of a change, so that runs need no second."""
UNSTEADY = {"seconds", "tokens_per_second", "memory_gib"}
"""Figures that differ whenever a step is taken again."""


def observe(config: PackedConfig | PPO, runs: Path) -> Observed:
    """What can be seen of a run, by aspect; of one that is refused, its error alone."""
    passes = []
    with pytest.MonkeyPatch.context() as patch:
        # On a CPU without bf16 arithmetic, precision would change nothing that can be seen here.
        patch.setattr("tuner.models.arithmetic.computes_in_bf16", lambda device: True)
        forward = LlamaMLP.forward
        patch.setattr(LlamaMLP, "forward", lambda self, x: passes.append(x.shape) or forward(self, x))
        try:
            run = tuner.train(config, runs=runs)
        except UserError as error:
            return {"error": str(error)}
        finally:
            deterministic = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(False)
    metrics, versions = run.metrics, run.read_json("versions")
    assert versions is not None
    figures = {name for record in metrics for name in record if name.partition("/")[0] not in UNSTEADY}
    checkpoint = max(run.checkpoints_folder.iterdir())
    state = json.loads((checkpoint / "state.json").read_text())
    return {
        **{name: [record.get(name) for record in metrics] for name in sorted(figures)},
        "folder": run.folder.name,
        "losses": [(record["loss"], record.get("grad_norm")) for record in metrics],
        "validation": [record.get("eval_loss") for record in metrics],
        "samples": run.samples,
        "rollouts": [path.read_text() for path in run.folder.glob("rollouts.jsonl")],
        "results": run.results,
        "weights": {name: hashed(tensor) for name, tensor in load_file(weights_of(run)).items()},
        "trained": {
            name: tuple(tensor.shape)
            for name, tensor in load_file(checkpoint / "trained.safetensors").items()
        },
        "roles": re.findall(r" roles: (.*)", (run.folder / "log.txt").read_text()),
        "checkpoints": sorted(path.name for path in run.checkpoints_folder.iterdir()),
        "optimiser": json.dumps(state["optimizer"]),
        "data": json.loads((run.folder / "data.json").read_text()),
        "cache": [path.name for path in Path().glob("cache") if not shutil.rmtree(path)],
        "place": versions["device"],
        "deterministic": deterministic,
        "forward passes": len(passes),
        "report": (run.folder / "report.json").read_text()
        if (run.folder / "report.json").is_file()
        else None,
        "error": None,
    }


def weights_of(run: Run) -> Path:
    return next(run.model_folder.glob("*.safetensors"))


def hashed(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def look(roles: None, tmp_path_factory: pytest.TempPathFactory) -> Look:
    """A run that is made once, however many changes are compared with it."""
    known: dict[str, Observed] = {}

    def at(config: PackedConfig | PPO, *changes: dict[str, Any]) -> Observed:
        try:
            for one in changes:
                config = override(config, one)
        except UserError as error:
            return {"error": str(error)}
        key = to_json(config)
        if key not in known:
            known[key] = observe(config, tmp_path_factory.mktemp("run"))
        return known[key]

    return at


def assert_seen(change: Change, look: Look) -> None:
    steps = {"max_steps": 1} if change.seen in OF_THE_FIRST_STEP else {}
    before = look(change.stage, steps, change.base)
    assert before["error"] is None
    after = look(change.stage, steps, change.base, change.to)
    if change.seen == "place" and not torch.cuda.is_available():
        assert "device='cuda'" in after["error"]
    elif change.seen == "error":
        assert after["error"]
    else:
        assert after["error"] is None
        assert after.get(change.seen) != before.get(change.seen)
    if change.alike:
        for name in ALIKE:
            figures = [[figure or 0.0 for figure in one[name]] for one in (after, before)]
            # Four updates (two steps of two epochs), each off by the model's rounding, 2.7e-5 by
            # tests/bounds.py::model_rounding: 1.1e-4, and Adam adds no more where the run is STEADY.
            assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("name", SEEN)
def test_a_change_is_seen(name: str, look: Look) -> None:
    assert_seen(SEEN[name], look)


@pytest.mark.parametrize("name", AGAIN)
def test_ppo_reads_it_too(name: str, look: Look) -> None:
    assert_seen(AGAIN[name], look)


@pytest.mark.parametrize("way", ["selective", "offload"])
@pytest.mark.parametrize("stage", [BASE, POLICY], ids=["sft", "ppo"])
def test_every_way_of_checkpointing_is_seen(stage: PackedConfig | PPO, way: str, look: Look) -> None:
    """Layers are computed again, and all that is learned stays as it was to the last bit."""
    before, after = look(stage), look(stage, {"gradient_checkpointing": way})
    assert after["forward passes"] > before["forward passes"]
    assert {name: after[name] for name in ("losses", "weights")} == {
        name: before[name] for name in ("losses", "weights")
    }


@pytest.mark.parametrize("stage", [BASE, POLICY], ids=["sft", "ppo"])
def test_the_same_config_looks_the_same(stage: PackedConfig | PPO, look: Look, tmp_path: Path) -> None:
    """Else any change would pass."""
    assert observe(stage, tmp_path) == look(stage)


def test_a_tracker_looks_on_where_the_config_names_one() -> None:
    from tuner.stages.registry import stage_of
    from tuner.stages.train import _watchers

    figures, tracked = stage_of(BASE).figures(BASE), override(BASE, {"tracking": Wandb(mode="offline")})
    assert "WandbTracker" in [type(watcher).__name__ for watcher in _watchers(tracked, figures)]
    assert "WandbTracker" not in [type(watcher).__name__ for watcher in _watchers(BASE, figures)]
