"""The seam between a rollout and its losses.

Generation and scores are the same for all algorithms; each defines its token rewards, advantages and losses.

Shapes: A answers of the rollout, N answer tokens of a packed row.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from tuner.config import VLLM, AdaptiveKL, PolicyConfig
from tuner.losses.policy import PolicySums, truncated_weights
from tuner.models.forward import token_logprobs, token_loss
from tuner.models.roles import Roles
from tuner.rollout.experience import Experience, Observed, Rewarded, observe, row_rewards
from tuner.rollout.rollout import Row
from tuner.rollout.updates import Update
from tuner.training.devices import Devices
from tuner.training.optimizers import Trained
from tuner.training.step import Step

Config = TypeVar("Config", bound=PolicyConfig)


class Algorithm(ABC, Generic[Config]):
    """One algorithm; the RL loop calls its methods in the order they are defined here."""

    roles: Collection[str] = ("reference",)
    """Roles it needs besides the policy and the reward model."""
    answers_per_prompt: int = 1
    """Size of a group: consecutive answers of a rollout to one prompt."""
    ratio_unit: str = "answer_tokens"
    """What has one probability ratio: "answer_tokens" or "answers"."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.kl = config.kl.initial if isinstance(config.kl, AdaptiveKL) else config.kl
        """KL penalty coefficient of the running step; the loop adapts it where the config says so."""

    def trained(self, roles: Roles) -> dict[str, Trained]:
        """The sets of weights it trains, by role."""
        return {"policy": Trained(roles.trained("policy"), self.config.optimizer.lr)}

    def trains(self, step: int) -> tuple[str, ...]:
        """Names of the sets of weights that a step (0-based) updates."""
        return ("policy",)

    def warnings(self, num_steps: int) -> list[str]:
        """Warnings about a run of so many steps, before it begins; each is a sentence."""
        return []

    def observe(self, roles: Roles, rows: Sequence[Row]) -> Sequence[Observed]:
        """Log-probabilities of the answers before the first update of the step."""
        return observe(roles, rows, self.config.sampling.temperature)

    def reward(self, observed: Sequence[Observed], shaped_A: np.ndarray) -> Sequence[Rewarded]:
        """Token rewards: the KL penalty at every token, the answer's shaped score at its last.

        shaped_A: of the whole rollout, float64.
        """
        estimator = self.config.kl_estimator
        return [
            Rewarded(**vars(row), rewards_N=row_rewards(row, shaped_A, self.kl, estimator))
            for row in observed
        ]

    @abstractmethod
    def estimate(
        self, rewarded: Sequence[Rewarded], rewards_A: np.ndarray, devices: Devices
    ) -> Sequence[Experience]:
        """The advantage of each token.

        rewards_A: summed token rewards of each answer of the whole rollout, float64: a group's answers may lie on
        several ranks.
        """

    @abstractmethod
    def learn(self, step: Step, roles: Roles, update: Update) -> None:
        """Accumulate the gradients of one update's losses; the caller takes the optimizer step.

        It may take steps of its own before, of sets that need more of them (`step.update`).
        """

    def token_figures(self, experience: Experience) -> Mapping[str, torch.Tensor]:
        """Further figures of a row, [N] each; a step logs their means over all answer tokens."""
        return {}

    def derived_figures(self, means: Mapping[str, float]) -> dict[str, float | None]:
        """What a step logs, from the means of all token figures; by default the means themselves."""
        return dict(means)

    # What algorithms share

    def new_logprobs(self, step: Step, model: torch.nn.Module, experience: Experience) -> torch.Tensor:
        """Log-probabilities of a row's answer tokens under the current weights, differentiable, fp32 [N].

        The pass that computes them also adds the entropy bonus, if any, to the step's loss. Roles of a policy stage
        have no dropout: with it, the ratio to the old log-probabilities would be noise even at equal weights.
        """
        bonus = self.config.entropy_bonus
        logprobs_N, entropies_N = token_logprobs(
            model, experience.row.batch, self.config.sampling.temperature, entropy=bonus > 0
        )
        if entropies_N is not None:
            step.add(-entropies_N.sum(), per="answer_tokens", name="entropy_loss", factor=bonus)
        return logprobs_N

    def sampler_weights(self, step: Step, experience: Experience) -> torch.Tensor | None:
        """Truncated importance weight of each token, fp32 [N]; None where losses correct nothing. Their mean is logged.

        They multiply the policy loss alone. The critic, the KL loss and the entropy bonus are no expectations of the
        policy gradient, and stay as they are.
        """
        engine, sampled_N = self.config.engine, experience.sampled_N
        if sampled_N is None or not isinstance(engine, VLLM):
            return None
        weights_N = truncated_weights(experience.old_N, sampled_N, engine.max_weight)
        step.note("importance_weight", weights_N.sum(), per="answer_tokens")
        return weights_N

    def note_ratios(self, step: Step, sums: PolicySums) -> None:
        """Log how far the update's policy is from the one that answered, per `ratio_unit`."""
        step.note("ratio", sums.ratio, per=self.ratio_unit)
        step.note("clipped", sums.clipped, per=self.ratio_unit)
        step.note("update_kl", sums.kl, per=self.ratio_unit)

    def learn_replay(self, step: Step, roles: Roles, update: Update) -> None:
        """Accumulate the gradients of the replayed rows' language modeling loss (PPO-ptx, arXiv 2203.02155)."""
        if self.config.replay is None:
            return
        coefficient = self.config.replay.coefficient
        with roles.role("policy", train=True) as model:
            for batch in update.replayed:
                step.add(token_loss(model, batch), "replay_tokens", "replay_loss", factor=coefficient)
                # Inside the role: switched before, its adapter would silently get no gradient.
                step.backward()


def algorithm_of(config: PolicyConfig) -> Algorithm[Any]:
    """The algorithm that a config's class names, built for that config. Its module is imported here, and no other."""
    # A string, so that configs import neither torch nor any algorithm.
    module, _, name = config.algorithm.partition(":")
    return getattr(importlib.import_module(module), name)(config)
