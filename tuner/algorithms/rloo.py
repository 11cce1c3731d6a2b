"""REINFORCE leave-one-out (arXiv 2402.14740), with a clipped ratio, so that several updates can use one rollout.

Shapes: A answers of the rollout, S answers of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tuner.algorithms.group import GroupAlgorithm
from tuner.config import RLOO as RLOOConfig
from tuner.config import VLLM
from tuner.losses.policy import answer_policy_loss, leave_one_out, truncated_answer_weights
from tuner.models.roles import Roles
from tuner.rollout.experience import Experience, Rewarded, broadcast_to_tokens
from tuner.rollout.updates import Update
from tuner.training.step import Step


@dataclass(frozen=True, eq=False)
class AnswerExperience(Experience):
    """A rewarded row with the advantage of each answer, fp32 [S]; the loss is taken on whole answers."""

    advantages_S: torch.Tensor


class RLOO(GroupAlgorithm[RLOOConfig]):
    """The baseline of an answer is the mean reward of the other answers to its prompt.

    An answer is one action, so its reward is the sum over its tokens, KL penalty included, and the penalty has the
    same baseline as the score.
    """

    ratio_unit = "answers"

    def advantages(self, rewards_A: np.ndarray) -> np.ndarray:
        return leave_one_out(rewards_A, self.answers_per_prompt)

    def experience(self, row: Rewarded, advantages_S: np.ndarray) -> AnswerExperience:
        return AnswerExperience(
            **vars(row),
            advantages_N=broadcast_to_tokens(advantages_S, row.row),
            advantages_S=torch.from_numpy(advantages_S).to(row.rewards_N),
        )

    def learn(self, step: Step, roles: Roles, update: Update) -> None:
        with roles.role("policy", train=True) as model:
            for experience in update.experiences:
                assert isinstance(experience, AnswerExperience)
                sums = answer_policy_loss(
                    self.new_logprobs(step, model, experience),
                    experience.old_N,
                    experience.advantages_S,
                    experience.row.borders,
                    self.config.clip,
                    weights_A=self._answer_weights(step, experience),
                )
                step.add(sums.loss, per="answers", name="policy_loss")
                self.note_ratios(step, sums)
                step.backward()
        self.learn_replay(step, roles, update)

    def _answer_weights(self, step: Step, experience: AnswerExperience) -> torch.Tensor | None:
        """Truncated importance weight of each answer, fp32 [S]; None where losses correct nothing. Their mean is
        logged."""
        engine, sampled_N = self.config.engine, experience.sampled_N
        if sampled_N is None or not isinstance(engine, VLLM):
            return None
        borders = experience.row.borders
        weights_S = truncated_answer_weights(experience.old_N, sampled_N, borders, engine.max_weight)
        step.note("importance_weight", weights_S.sum(), per="answers")
        return weights_S
