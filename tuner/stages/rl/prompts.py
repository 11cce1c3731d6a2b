"""A policy stage's prompts: loaded, checked against the reward models, and cut into steps; and its replayed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuner.algorithms.algorithm import algorithm_of
from tuner.config import PolicyConfig
from tuner.data.dataset import Dataset, Progress
from tuner.data.examples import Examples
from tuner.data.load_examples import load_examples
from tuner.data.load_prompts import RewardReader, load_prompts
from tuner.data.prompt_stream import PromptStream, plan_prompts
from tuner.data.prompts import PromptSet
from tuner.errors import UserError
from tuner.models.load_roles import PolicyRoles
from tuner.models.locate import locate
from tuner.models.positions import Positions
from tuner.models.reward_record import known_conditions
from tuner.models.roles import Roles
from tuner.models.scorer import reward_template
from tuner.stages.context import Context
from tuner.stages.row_lengths import long_rows


def load_policy_prompts(
    config: PolicyConfig, tokenizer: Any, *, progress: Progress | None = None
) -> Dataset[PromptSet]:
    """The prompts of a config. Raises UserError for a prompt whose answers its reward model cannot score."""
    return load_prompts(config.prompts, tokenizer, reward_reader(config), progress=progress)


def load_rows(
    config: PolicyConfig, context: Context, loaded: PolicyRoles
) -> tuple[Dataset[PromptSet], PromptStream, Dataset[Examples] | None]:
    """Prompts, their steps, and replayed rows. Raises UserError where a resumed run finds other rows than before."""
    tokenizer = loaded.roles.tokenizer
    # of the model in memory, so that one from a hub checks the prompts, too
    reader = joined([inputs.reader for inputs in loaded.reward_inputs.values()])
    with context.reading() as progress:  # one bar for both; an error must remove it
        prompts = load_prompts(config.prompts, tokenizer, reader, progress=progress)
        stream = plan_run(config, prompts)
        replay = None
        if config.replay is not None:
            replay = load_examples(config.replay.data, tokenizer, progress=progress)
    context.pin_rows(*([prompts] if replay is None else [prompts, replay]))
    return prompts, stream, replay


def reward_reader(config: PolicyConfig) -> RewardReader | None:
    """Checks prompts against the reward models that are local folders; None where there is none, or a rule scores."""
    readers: list[RewardReader] = []
    for model in config.reward_models:
        if Path(model.path).is_dir():
            location = locate(model, weights=False)
            _, template = reward_template(model, location)
            readers.append(RewardReader(tuple(known_conditions(location.folder)), template))
    return joined(readers)


def joined(readers: Sequence[RewardReader]) -> RewardReader | None:
    """A reader that checks prompts against all of the reward models; None where there are none."""
    if not readers:
        return None
    first, *further = readers
    return replace(first, further=tuple(further))


def long_prompts(
    config: PolicyConfig, roles: Roles, prompts: Dataset[PromptSet], replay: Dataset[Examples] | None
) -> list[str]:
    """Sentences on prompts that, with their answers, are longer than the policy was trained for, and on such rows.

    Raises UserError for a row that is longer than learned positions go.
    """
    positions = Positions.of(roles.loaded.transformer)
    sentences = long_rows(prompts, positions, config.sampling.max_new_tokens)
    return sentences + ([] if replay is None else long_rows(replay, positions))


def plan_run(config: PolicyConfig, prompts: Dataset[PromptSet]) -> PromptStream:
    """The prompts of each step. Raises UserError where a gold rule has no held-out prompt to measure on."""
    field = "rule" if config.evaluation.rule else "keep_best" if config.evaluation.keep_best else None
    if field is not None and prompts.test is None:
        raise UserError(
            f"evaluation.{field}: no prompt is held out for it to measure ({prompts.report}); give prompts.test_files, "
            f"or a larger prompts.split.test, or leave {field} out"
        )
    return plan_prompts(
        prompts.train,
        prompts_per_step=config.prompts_per_step,
        epochs=config.epochs,
        seed=config.seed,
        sources=config.prompts.sources,
        answers_per_prompt=algorithm_of(config).answers_per_prompt,
        max_new_tokens=config.sampling.max_new_tokens,
    )
