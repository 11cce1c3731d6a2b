"""Dry run of a policy stage: its models without weights, its prompts and replayed rows, its memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from tuner.algorithms.algorithm import Algorithm, algorithm_of
from tuner.config import VLLM, PolicyConfig, Rule
from tuner.data.load_examples import load_examples
from tuner.data.load_prompts import load_prompts
from tuner.models.kv_cache import numbers_per_token
from tuner.models.load import load_model
from tuner.models.load_roles import load_policy_roles
from tuner.models.memory import MemoryPlan, roles_plan
from tuner.models.positions import check_generated_length
from tuner.models.reward_roles import reward_role_names
from tuner.models.roles import Role, Roles
from tuner.rollout.rules import load_rule
from tuner.stages.check import META, CheckReport, memory_budget, model_figures, refuse_model_in_layout
from tuner.stages.memory_budget import Options, pass_sizes
from tuner.stages.memory_savings import savings
from tuner.stages.rl.engine import engine_notes, refuse_engine
from tuner.stages.rl.models import policy_models
from tuner.stages.rl.prompts import long_prompts, plan_run, reward_reader
from tuner.stages.rl.reward_source import references
from tuner.stages.rl.sampling_notes import sampling_notes

CACHES_GIB = (64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
"""Sizes of the key-value cache that `memory` tries; the first holds 256 answers of 2,048 tokens of InternLM2-7B."""


def check_policy(config: PolicyConfig, stand_ins: frozenset[str]) -> CheckReport:
    """The dry run; see Stage.check."""
    load_rule(config.evaluation.rule, "evaluation.rule")
    if isinstance(config.reward, Rule):
        load_rule(config.reward.function, "reward")
    for index, rule in enumerate(config.added_rewards):
        load_rule(rule.function, f"added_rewards.{index}")
    algorithm, untrained_reward = algorithm_of(config), bool(_reward_fields(config) & stand_ins)
    roles = _load_roles(config, algorithm, stand_ins)
    for loaded in roles.models:
        refuse_model_in_layout(config, loaded)
    check_generated_length(
        roles.loaded.transformer, config.prompts.max_length + config.sampling.max_new_tokens
    )
    refuse_engine(config, roles.loaded)
    reader = None if untrained_reward else reward_reader(config)
    prompts = load_prompts(config.prompts, roles.tokenizer, reader)
    replay = None if config.replay is None else load_examples(config.replay.data, roles.tokenizer)
    stream = plan_run(config, prompts)
    steps = min(len(stream), config.max_steps or len(stream))
    trained = (weight for part in algorithm.trained(roles).values() for weight in part.parameters.values())
    memory = policy_memory(config, algorithm, roles)
    return CheckReport(
        **model_figures(roles.loaded),
        trained=sum(weight.numel() for weight in trained),
        data="; ".join(str(part.report) for part in (prompts, replay) if part is not None),
        steps=steps,
        tokens=stream.tokens_until(steps),
        passes=None,
        fill=min(config.prompts_per_step, stream.drawn) / config.prompts_per_step,
        peak_gib=memory.peak / 2**30,
        memory=memory,
        savings=savings(config, memory, lambda changed: policy_memory(changed, algorithm, roles)),
        warnings=(*_further_bases(config, roles, untrained_reward), *algorithm.warnings(steps)),
        notes=(
            *roles.notes,
            *long_prompts(config, roles, prompts, replay),
            *engine_notes(config, roles.loaded),
            *sampling_notes(config.sampling, has_reference="reference" in roles),
        ),
    )


def policy_memory(config: PolicyConfig, algorithm: Algorithm[Any], roles: Roles) -> MemoryPlan:
    """The plan of its memory, including the key/value cache of generation."""
    budget = memory_budget(config, config.tokens_per_pass, language_head=True)
    answers = config.prompts_per_step * algorithm.answers_per_prompt
    longest = config.prompts.max_length + config.sampling.max_new_tokens
    per_token = numbers_per_token(roles.loaded.transformer.config) * budget.product_bytes
    # The limit is reached only by rollouts that large; smaller ones hold keys and values of their own size.
    held = max(min(int(config.sampling.cache_gib * 2**30 / per_token), answers * longest), longest)
    budget = replace(
        budget,
        generates=True,
        generated=held,
        generated_rows=min(answers, held // longest),
        prefilled=min(config.tokens_per_pass, answers * config.prompts.max_length),
    )
    return roles_plan(budget, roles)


def policy_memory_plans(config: PolicyConfig) -> Callable[[PolicyConfig], MemoryPlan]:
    """See Stage.memory_plans."""
    algorithm = algorithm_of(config)
    roles = _load_roles(config, algorithm, frozenset())
    return lambda changed: policy_memory(changed, algorithm, roles)


def policy_memory_options(config: PolicyConfig, processes: int) -> Options:
    """See Stage.memory_options. A server has a cache of its own, outside of the plan."""
    answers = config.prompts_per_step * algorithm_of(config).answers_per_prompt
    longest, together = config.prompts.max_length + config.sampling.max_new_tokens, config.parallel.sequence
    share = answers * longest // config.mini_batches // max(processes // together, 1)
    replayed = 0 if config.replay is None else config.replay.max_length
    return Options(
        passes=pass_sizes(max(longest, replayed), share, together),
        caches=() if isinstance(config.engine, VLLM) else CACHES_GIB,
    )


def _load_roles(config: PolicyConfig, algorithm: Algorithm[Any], stand_ins: frozenset[str]) -> Roles:
    """The roles of a config, without weights.

    A reward model that is a small random one has no template and no conditions, and a critic cannot start from it, so
    reward models are then loaded apart from the others. Beside a stand-in, policy or reference, the reference is the
    policy: the tokenizer of the other would be refused.
    """
    models = policy_models(config, algorithm.roles)
    if stand_ins & {"policy", "reference"}:
        models = replace(models, reference=None)
    if not _reward_fields(config) & stand_ins:
        loaded = load_policy_roles(models, META, nullcontext)
        references(config, loaded.reward_inputs)
        return loaded.roles
    adapter = None if config.roles == "shared" else models.critic_adapter
    models = replace(models, reward=None, critic_from="policy", critic_adapter=adapter)
    models = replace(models, roles=models.roles - {"reward"})
    rewards = {
        name: Role(load_model(model, precision=config.precision, device=META, train=False, head="score"))
        for name, model in zip(
            reward_role_names(len(config.reward_models)), config.reward_models, strict=True
        )
    }
    roles = load_policy_roles(models, META, nullcontext).roles
    return Roles({name: roles[name] for name in roles} | rewards, nullcontext)


def _reward_fields(config: PolicyConfig) -> set[str]:
    """The config's fields that name reward models."""
    return {"reward", *(f"further_rewards.{index}" for index in range(len(config.further_rewards)))}


def _further_bases(config: PolicyConfig, roles: Roles, untrained_reward: bool) -> list[str]:
    """Sentences on roles that share no base with the policy, though roles are to be shared."""
    if config.roles == "separate":
        return []
    differ = "stand on two bases, which are both held: they differ, or in quantization, rope or precision"
    sentences = {"reference": f"policy and reference {differ}"}
    if not untrained_reward:
        sentences["reward"] = f"policy and reward model {differ}, or the reward model is no adapter"
        names = reward_role_names(len(config.reward_models))[1:]
        for name, model in zip(names, config.further_rewards, strict=True):
            sentences[name] = (
                f"policy and the further reward model {model.path} {differ}, or it is no adapter"
            )
    return [
        sentence
        for role, sentence in sentences.items()
        if role in roles and roles[role].loaded.model is not roles.loaded.model
    ]
