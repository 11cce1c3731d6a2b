"""Group relative policy optimization (arXiv 2402.03300), with DAPO's clip and normalization (arXiv 2503.14476).

Shapes: A answers of the rollout, S answers of a packed row, N answer tokens of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tuner.algorithms.algorithm import Algorithm
from tuner.config import GRPO as GRPOConfig
from tuner.losses.policy import group_advantages, kl_estimate, policy_loss
from tuner.models.roles import Roles
from tuner.rollout.experience import Experience, Observed, Rewarded, broadcast_to_tokens, row_rewards
from tuner.rollout.updates import Update
from tuner.training.devices import Devices
from tuner.training.step import Step


class GRPO(Algorithm[GRPOConfig]):
    """The baseline of an answer is the mean score of its group; the KL penalty, if any, is part of the loss.

    Not part of the reward, as in PPO and RLOO: the group's baseline is then of scores alone (2402.03300, 4.1.1).
    """

    def __init__(self, config: GRPOConfig) -> None:
        super().__init__(config)
        self.answers_per_prompt = config.answers_per_prompt
        # Without a KL penalty no reference is loaded, and its forward pass is saved.
        self.roles = ("reference",) if config.kl else ()

    def reward(self, observed: Sequence[Observed], shaped_A: np.ndarray) -> Sequence[Rewarded]:
        """The shaped score at each answer's last token, without a KL penalty: that is in the loss."""
        estimator = self.config.kl_estimator
        return [
            Rewarded(**vars(row), rewards_N=row_rewards(row, shaped_A, 0.0, estimator)) for row in observed
        ]

    def estimate(
        self, rewarded: Sequence[Rewarded], rewards_A: np.ndarray, devices: Devices
    ) -> Sequence[Experience]:
        """Each token has its answer's group-relative advantage."""
        advantages_A = group_advantages(rewards_A, self.answers_per_prompt, self.config.scale_advantages)
        return [
            Experience(**vars(row), advantages_N=broadcast_to_tokens(advantages_A[row.row.answers], row.row))
            for row in rewarded
        ]

    def learn(self, step: Step, roles: Roles, update: Update) -> None:
        config = self.config
        per = "answer_tokens" if config.normalization == "token" else "answers"
        for experience in update.experiences:
            with roles.role("policy", train=True) as model:
                logprobs_N, weights_N = self.new_logprobs(model, experience), self._weights(experience)
                sums = policy_loss(
                    logprobs_N,
                    experience.old_N,
                    experience.advantages_N,
                    config.clip,
                    clip_high=config.clip_high,
                    weights_N=weights_N,
                )
                step.add(sums.loss, per=per, name="policy_loss")
                if experience.reference_N is not None:
                    kl_N = kl_estimate(logprobs_N, experience.reference_N, config.kl_estimator)
                    kl = (kl_N if weights_N is None else kl_N * weights_N).sum()
                    step.add(kl, per=per, name="kl_loss", factor=config.kl)
                step.note("ratio", sums.ratio, per="answer_tokens")
                step.note("clipped", sums.clipped, per="answer_tokens")
                step.note("update_kl", sums.kl, per="answer_tokens")
                step.backward()
        self.learn_replay(step, roles, update)

    def _weights(self, experience: Experience) -> torch.Tensor | None:
        """1 / length of each token's answer, [N], so that answers weigh equally; None, if tokens do."""
        if self.config.normalization == "token":
            return None
        lengths_S = np.diff(experience.row.borders)
        return broadcast_to_tokens(1 / np.maximum(lengths_S, 1), experience.row)
