"""Finished policies that answer the same prompts, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from tuner.config import Model, PolicyConfig
from tuner.data.prompts import PromptSet
from tuner.data.rendered import encode
from tuner.data.template import Template
from tuner.display.progress import progress_bar
from tuner.errors import UserError
from tuner.evaluation.judge import Answers, answer_held_out
from tuner.models.arithmetic import autocast
from tuner.models.chat import end_ids
from tuner.models.load import load_model
from tuner.models.locate import locate
from tuner.models.roles import Roles
from tuner.models.tokenizer import read_tokenizer
from tuner.rollout.engine import LocalEngine
from tuner.stages.finished_model import free_memory
from tuner.training.devices import Devices

T = TypeVar("T")


@dataclass(frozen=True)
class Entrant:
    """A policy to generate with, and the prompts as it reads them."""

    name: str
    """Name in tables."""
    path: str
    """As the user wrote it."""
    model: Model
    precision: Literal["bf16", "fp32"]
    prompts: PromptSet
    """Tokenized for this policy."""
    end_ids: frozenset[int]
    """Tokens that end an answer."""


def entrant(
    name: str, path: str, model: Model, config: PolicyConfig, prompts: PromptSet, chat_template: str
) -> Entrant:
    """Locate a policy, and tokenize the prompts for it.

    path: as messages name it. chat_template: for a policy without one of its own. Raises UserError where the model is
    missing, is no policy, or its chat template cannot take the prompts.
    """
    location = locate(model, weights=False)
    if location.has_score:
        raise UserError(
            f"{path}: a reward model cannot answer; --against takes a policy: an SFT, DPO, PPO, GRPO or RLOO run, a "
            "folder with a language model, or a hub name"
        )
    tokenizer: Any = read_tokenizer(location.tokenizer_folder, trust_remote_code=model.trust_remote_code)
    try:
        tokenizer.chat_template = getattr(tokenizer, "chat_template", None) or chat_template
        template = Template("tokenizer", tokenizer, config.prompts.spelled_tokens)
        rendered = [
            template.render_header(prompts.prompt(index).policy_input()) for index in range(len(prompts))
        ]
        ends = end_ids(template, tokenizer)
    except UserError as error:
        raise UserError(f"{path}: cannot answer these prompts: {error}") from error
    ids = encode(tokenizer, rendered)
    encoded = replace(
        prompts,
        tokens_T=np.array([token for prompt_ids in ids for token in prompt_ids], dtype=np.int32),
        offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
    )
    # An adapter in the precision it was trained in; complete models all in the run's, so that they compare alike.
    precision = config.precision if location.adapter_folder is None else location.precision
    return Entrant(name, path, model, precision, encoded, ends)


def answer(
    entrant: Entrant,
    config: PolicyConfig,
    devices: Devices,
    measure: Callable[[Roles], T] = lambda policy: None,
) -> tuple[Answers, T]:
    """A policy's answers, sampled as the config evaluates, and a measure of it; its model is freed before this returns.

    measure: called with the policy while it is in memory, and must not keep it.
    """
    loaded = load_model(entrant.model, precision=entrant.precision, device=devices.device, train=False)
    policy = Roles.of("policy", loaded, partial(autocast, devices.device, entrant.precision))
    engine = LocalEngine(
        policy, entrant.end_ids, config.sampling, config.seed, config.tokens_per_pass, devices
    )
    with progress_bar(f"{entrant.name} answers", len(entrant.prompts)) as advance:
        answers = answer_held_out(entrant.prompts, engine, policy.tokenizer, config.evaluation.temperature)
        advance(len(entrant.prompts))
    measured = measure(policy)
    # Each of them holds the model: with one left, two models would be in memory when the next is loaded.
    del loaded, policy, engine
    free_memory()
    return answers, measured
