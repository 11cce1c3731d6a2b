"""Group relative policy optimization (arXiv 2402.03300), with DAPO's clip and normalization (arXiv 2503.14476).

Shapes: A answers of the rollout, S answers of a packed row, N answer tokens of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tuner.algorithms.group import GroupAlgorithm
from tuner.config import GRPO as GRPOConfig
from tuner.losses.policy import group_advantages, kl_estimate, policy_loss
from tuner.models.roles import Roles
from tuner.rollout.experience import Experience, Observed, Rewarded, broadcast_to_tokens, row_rewards
from tuner.rollout.updates import Update
from tuner.training.step import Step


@dataclass(frozen=True, eq=False)
class WeightedExperience(Experience):
    """A rewarded row with 1 / length of each token's answer, fp32 [N], so that answers weigh equally in the loss; None
    where tokens do."""

    weights_N: torch.Tensor | None


class GRPO(GroupAlgorithm[GRPOConfig]):
    """The baseline of an answer is the mean score of its group; the KL penalty, if any, is part of the loss.

    Not part of the reward, as in PPO and RLOO: the group's baseline is then of scores alone (2402.03300, 4.1.1).
    """

    def reward(self, observed: Sequence[Observed], shaped_A: np.ndarray) -> Sequence[Rewarded]:
        """The shaped score at each answer's last token, without a KL penalty: that is in the loss."""
        estimator = self.config.kl_estimator
        return [
            Rewarded(**vars(row), rewards_N=row_rewards(row, shaped_A, 0.0, estimator)) for row in observed
        ]

    def advantages(self, rewards_A: np.ndarray) -> np.ndarray:
        return group_advantages(rewards_A, self.answers_per_prompt, self.config.scale_advantages)

    def experience(self, row: Rewarded, advantages_S: np.ndarray) -> WeightedExperience:
        weights_N = None
        if self.config.normalization == "answer":
            weights_N = broadcast_to_tokens(1 / np.diff(row.row.borders), row.row)
        advantages_N = broadcast_to_tokens(advantages_S, row.row)
        return WeightedExperience(**vars(row), advantages_N=advantages_N, weights_N=weights_N)

    def learn(self, step: Step, roles: Roles, update: Update) -> None:
        config = self.config
        per = "answer_tokens" if config.normalization == "token" else "answers"
        with roles.role("policy", train=True) as model:
            for experience in update.experiences:
                assert isinstance(experience, WeightedExperience)
                logprobs_N, weights_N = self.new_logprobs(step, model, experience), experience.weights_N
                sampler_N = self.sampler_weights(step, experience)
                sums = policy_loss(
                    logprobs_N,
                    experience.old_N,
                    experience.advantages_N,
                    config.clip,
                    clip_high=config.clip_high,
                    weights_N=_product(weights_N, sampler_N),
                )
                step.add(sums.loss, per=per, name="policy_loss")
                if experience.reference_N is not None and self.kl:  # at 0 it is there to measure alone
                    kl_N = kl_estimate(logprobs_N, experience.reference_N, config.kl_estimator)
                    kl = (kl_N if weights_N is None else kl_N * weights_N).sum()
                    step.add(kl, per=per, name="kl_loss", factor=self.kl)
                self.note_ratios(step, sums)
                step.backward()
        self.learn_replay(step, roles, update)


def _product(weights_N: torch.Tensor | None, others_N: torch.Tensor | None) -> torch.Tensor | None:
    """Weights times others; None stands for ones."""
    if weights_N is None or others_N is None:
        return others_N if weights_N is None else weights_N
    return weights_N * others_N
