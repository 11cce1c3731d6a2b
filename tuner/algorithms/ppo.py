"""Proximal policy optimization with a critic (arXiv 1707.06347), as in the InternLM2 report (arXiv 2403.17297, 4.2.3).

Shapes: A answers of the rollout, N answer tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from tuner.algorithms.algorithm import Algorithm
from tuner.config import PPO as PPOConfig
from tuner.losses.moments import MomentSums
from tuner.losses.policy import advantages, explained_variance, policy_loss, value_loss, whitened
from tuner.models.forward import values
from tuner.models.roles import Roles
from tuner.rollout.experience import Experience, Observed, Rewarded, row_rewards
from tuner.rollout.rollout import Row
from tuner.rollout.updates import Update
from tuner.training.devices import Devices
from tuner.training.optimizers import Trained
from tuner.training.step import Step


@dataclass(frozen=True, eq=False)
class Valued(Observed):
    """An observed row with the critic's value before each token: its estimate of the rewards to come; fp32 [N]."""

    values_N: torch.Tensor


@dataclass(frozen=True, eq=False)
class ValuedReward(Valued, Rewarded):
    """A valued row with the reward of each token."""


@dataclass(frozen=True, eq=False)
class ValuedExperience(ValuedReward, Experience):
    """A valued and rewarded row with its advantages, and with the returns the critic is trained on, fp32 [N]."""

    returns_N: torch.Tensor


class PPO(Algorithm[PPOConfig]):
    """Clipped policy loss on GAE advantages, a critic trained by squared error, and a critic warm-up."""

    roles = ("reference", "critic")

    def trained(self, roles: Roles) -> dict[str, Trained]:
        config = self.config
        return {
            # The policy's schedule starts after the critic's warm-up, else its own warm-up would pass unused.
            "policy": Trained(roles.trained("policy"), config.optimizer.lr, config.critic_warmup),
            "critic": Trained(roles.trained("critic"), config.critic_lr),
        }

    def trains(self, step: int) -> tuple[str, ...]:
        return ("critic",) if step < self.config.critic_warmup else ("policy", "critic")

    def warnings(self, num_steps: int) -> list[str]:
        if num_steps > self.config.critic_warmup:
            return []
        return [
            f"all {num_steps:,} steps are the critic's warm-up (critic_warmup={self.config.critic_warmup}): the policy "
            "learns nothing; lower it, or give more steps"
        ]

    def observe(self, roles: Roles, rows: Sequence[Row]) -> Sequence[Valued]:
        observed = super().observe(roles, rows)
        with roles.role("critic") as model:
            return [Valued(**vars(row), values_N=values(model, row.row.batch)) for row in observed]

    def reward(self, observed: Sequence[Observed], shaped_A: np.ndarray) -> Sequence[ValuedReward]:
        estimator = self.config.kl_estimator
        return [
            ValuedReward(**vars(row), rewards_N=row_rewards(row, shaped_A, self.kl, estimator))
            for row in observed
        ]

    def estimate(
        self, rewarded: Sequence[Rewarded], rewards_A: np.ndarray, devices: Devices
    ) -> Sequence[ValuedExperience]:
        """Generalized advantage estimates within each answer, whitened over all ranks where the config says so."""
        config = self.config
        experiences: list[ValuedExperience] = []
        for row in rewarded:
            assert isinstance(row, ValuedReward)
            values = row.rewards_N, row.values_N, row.row.borders, config.gamma
            advantages_N, returns_N = advantages(*values, config.gae_lambda)
            if config.value_gae_lambda is not None:
                _, returns_N = advantages(*values, config.value_gae_lambda)
            experiences.append(ValuedExperience(**vars(row), advantages_N=advantages_N, returns_N=returns_N))
        return _whitened(experiences, devices) if self.config.whiten_advantages else experiences

    def learn(self, step: Step, roles: Roles, update: Update) -> None:
        """The gradients of policy and critic, after the steps that the critic takes alone (`critic_updates`)."""
        for _ in range(self.config.critic_updates - 1):
            self._learn_values(step, roles, update)
            step.update("critic")
        if "policy" in self.trains(step.index):
            self._learn_policy(step, roles, update)
            self.learn_replay(step, roles, update)
        self._learn_values(step, roles, update)

    def _learn_policy(self, step: Step, roles: Roles, update: Update) -> None:
        with roles.role("policy", train=True) as model:
            for experience in update.experiences:
                logprobs_N = self.new_logprobs(step, model, experience)
                sums = policy_loss(
                    logprobs_N,
                    experience.old_N,
                    experience.advantages_N,
                    self.config.clip,
                    weights_N=self.sampler_weights(step, experience),
                )
                step.add(sums.loss, per="answer_tokens", name="policy_loss")
                self.note_ratios(step, sums)
                step.backward()

    def _learn_values(self, step: Step, roles: Roles, update: Update) -> None:
        with roles.role("critic", train=True) as model:
            for experience in update.experiences:
                assert isinstance(experience, ValuedExperience)
                values_N = values(model, experience.row.batch)
                loss = value_loss(values_N, experience.returns_N, experience.values_N, self.config.value_clip)
                step.add(loss, per="answer_tokens", name="value_loss")
                step.backward()

    def token_figures(self, experience: Experience) -> Mapping[str, torch.Tensor]:
        assert isinstance(experience, ValuedExperience)
        residuals_N = experience.returns_N - experience.values_N
        return {
            "value": experience.values_N,
            "returns": experience.returns_N,
            # float64: a variance from means and mean squares cancels in fp32.
            "returns_squares": experience.returns_N.double().square(),
            "residuals": residuals_N,
            "residuals_squares": residuals_N.double().square(),
        }

    def derived_figures(self, means: Mapping[str, float]) -> dict[str, float | None]:
        """The explained variance in place of the moments it is computed from."""
        returns, residuals = (
            MomentSums(1.0, means[name], means[f"{name}_squares"]) for name in ("returns", "residuals")
        )
        logged = {name: mean for name, mean in means.items() if not name.startswith(("returns", "residuals"))}
        return {**logged, "explained_variance": explained_variance(returns, residuals)}


def _whitened(experiences: Sequence[ValuedExperience], devices: Devices) -> Sequence[ValuedExperience]:
    """Advantages with mean 0 and standard deviation 1 over the tokens of all ranks that losses are taken on."""
    learned = [row.advantages_N[row.row.learned_tokens] for row in experiences]
    local = sum(map(MomentSums.of, learned), start=MomentSums(0, 0, 0))
    # Over all ranks: moments per rank would make the loss depend on the number of processes.
    moments = MomentSums(**devices.sum(asdict(local)))
    return [replace(row, advantages_N=whitened(row.advantages_N, moments)) for row in experiences]
