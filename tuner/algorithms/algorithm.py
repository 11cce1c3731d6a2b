"""The seam between a rollout and its losses.

A step of the RL stage is the same for all algorithms up to the scores of its answers; what each token is rewarded
with, what its advantage is, and which losses it is trained with, is the algorithm's.

Shapes: A answers of the rollout, N answer tokens of a packed row.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

from tuner.config import PolicyConfig
from tuner.models.forward import token_logprobs, token_loss
from tuner.models.roles import Roles
from tuner.rollout.experience import Experience, Observed, Rewarded, observe, row_rewards
from tuner.rollout.updates import Update
from tuner.training.devices import Devices
from tuner.training.optimizers import Trained
from tuner.training.step import Step

Config = TypeVar("Config", bound=PolicyConfig)


class Algorithm(ABC, Generic[Config]):
    """What one algorithm does between a rollout and its losses; the parts are called in the order they stand here."""

    roles: Collection[str] = ("reference",)
    """Roles it needs beside the policy and, where a model scores the answers, the reward model."""
    answers_per_prompt: int = 1

    def __init__(self, config: Config) -> None:
        self.config = config

    def trained(self, roles: Roles) -> dict[str, Trained]:
        """The sets of weights it trains, by the role they belong to."""
        return {"policy": Trained(roles.trained("policy"), self.config.optimizer.lr)}

    def trains(self, step: int) -> tuple[str, ...]:
        """Names of the sets of weights that are updated in a step (0-based)."""
        return ("policy",)

    def warnings(self, num_steps: int) -> list[str]:
        """What a user should know of a run of so many steps before it begins, in sentences."""
        return []

    def observe(self, roles: Roles, rows: Sequence) -> Sequence[Observed]:
        """Log-probabilities of the answers, before anything is learned from them."""
        return observe(roles, rows, self.config.sampling.temperature)

    def reward(self, observed: Sequence[Observed], shaped_A: np.ndarray) -> Sequence[Rewarded]:
        """The reward of each token: the KL penalty, and an answer's shaped score on its last token."""
        config = self.config
        return [
            Rewarded(**vars(row), rewards_N=row_rewards(row, shaped_A, config.kl, config.kl_estimator))
            for row in observed
        ]

    @abstractmethod
    def estimate(
        self, rewarded: Sequence[Rewarded], rewards_A: np.ndarray, devices: Devices
    ) -> Sequence[Experience]:
        """The advantage of each token. rewards_A: summed reward of every answer of the rollout, over all ranks."""

    @abstractmethod
    def learn(self, step: Step, roles: Roles, update: Update) -> None:
        """Gradients of the losses of one update; the caller makes the optimizer step."""

    def token_figures(self, experience: Experience) -> Mapping[str, torch.Tensor]:
        """Figures of its own, [N] each, of which a step logs the mean over all answer tokens."""
        return {}

    def derived_figures(self, means: Mapping[str, float]) -> dict[str, float | None]:
        """What a step logs of these means (its own and the common ones): by default the means themselves."""
        return dict(means)

    # What algorithms share

    def new_logprobs(self, model: torch.nn.Module, experience: Experience) -> torch.Tensor:
        """Log-probabilities of a row's answer tokens under the current weights, differentiable, fp32 [N]."""
        return token_logprobs(model, experience.row.batch, self.config.sampling.temperature)[0]

    def learn_replay(self, step: Step, roles: Roles, update: Update) -> None:
        """Gradients of the language-modeling loss of the replayed rows (PPO-ptx)."""
        coefficient = 0.0 if self.config.replay is None else self.config.replay.coefficient
        for batch in update.replayed:
            with roles.role("policy", train=True) as model:
                step.add(token_loss(model, batch), "replay_tokens", "replay_loss", factor=coefficient)
                step.backward()


def algorithm_of(config: PolicyConfig) -> Algorithm:
    """The algorithm that a config's class names, made for it; its module is imported here."""
    module, _, name = config.algorithm.partition(":")
    return getattr(importlib.import_module(module), name)(config)
