"""REINFORCE leave-one-out (arXiv 2402.14740), with a clipped ratio, so that several updates can use one rollout.

Shapes: A answers of the rollout, S answers of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuner.algorithms.algorithm import Algorithm
from tuner.config import RLOO as RLOOConfig
from tuner.losses.policy import answer_policy_loss, leave_one_out
from tuner.models.roles import Roles
from tuner.rollout.experience import Experience, Rewarded, broadcast_to_tokens
from tuner.rollout.updates import Update
from tuner.training.devices import Devices
from tuner.training.step import Step


class RLOO(Algorithm[RLOOConfig]):
    """The baseline of an answer is the mean reward of the other answers to its prompt.

    An answer is one action, so its reward is the sum over its tokens, KL penalty included, and the penalty has the
    same baseline as the score.
    """

    def __init__(self, config: RLOOConfig) -> None:
        super().__init__(config)
        self.answers_per_prompt = config.answers_per_prompt
        # Without a KL penalty no reference is loaded, and its forward pass is saved.
        self.roles = ("reference",) if config.kl else ()

    def estimate(
        self, rewarded: Sequence[Rewarded], rewards_A: np.ndarray, devices: Devices
    ) -> Sequence[Experience]:
        advantages_A = leave_one_out(rewards_A, self.answers_per_prompt)
        return [
            Experience(**vars(row), advantages_N=broadcast_to_tokens(advantages_A[row.row.answers], row.row))
            for row in rewarded
        ]

    def learn(self, step: Step, roles: Roles, update: Update) -> None:
        for experience in update.experiences:
            borders = experience.row.borders
            advantages_S = experience.advantages_N[list(borders[:-1])]  # equal for all tokens of an answer
            with roles.role("policy", train=True) as model:
                logprobs_N = self.new_logprobs(model, experience)
                sums = answer_policy_loss(
                    logprobs_N, experience.old_N, advantages_S, borders, self.config.clip
                )
                step.add(sums.loss, per="answers", name="policy_loss")
                step.note("ratio", sums.ratio, per="answers")
                step.note("clipped", sums.clipped, per="answers")
                step.note("update_kl", sums.kl, per="answers")
                step.backward()
        self.learn_replay(step, roles, update)
