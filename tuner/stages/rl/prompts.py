"""A policy stage's prompts: loaded, checked against the reward model, and cut into steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuner.config import PolicyConfig
from tuner.data.dataset import Dataset, Progress
from tuner.data.load_prompts import RewardReader, load_prompts
from tuner.data.prompt_stream import PromptStream, plan_prompts
from tuner.data.prompts import PromptSet
from tuner.errors import UserError
from tuner.models.locate import locate
from tuner.models.reward_record import known_conditions
from tuner.models.scorer import reward_template


def load_policy_prompts(
    config: PolicyConfig, tokenizer: Any, *, progress: Progress | None = None
) -> Dataset[PromptSet]:
    """The prompts of a config. Raises UserError for a prompt whose answers its reward model cannot score."""
    return load_prompts(config.prompts, tokenizer, reward_reader(config), progress=progress)


def reward_reader(config: PolicyConfig) -> RewardReader | None:
    """Checks prompts against the reward model; None where a rule scores, or the model is not a local folder."""
    model = config.reward_model
    if model is None or not Path(model.path).is_dir():
        return None
    location = locate(model, weights=False)
    _, template = reward_template(model, location)
    return RewardReader(tuple(known_conditions(location.folder)), template)


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
    )
