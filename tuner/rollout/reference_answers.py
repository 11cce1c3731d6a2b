"""Answers of the reference policy to a step's prompts, which rewards compare the policy's with.

Shapes: A answers of the policy, R of the reference, M of the reference to the prompt of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tuner.config import LengthPenalty
from tuner.data.prompts import PromptSet
from tuner.rollout.engine import LocalEngine
from tuner.rollout.rollout import Rollout, answer_prompts
from tuner.rollout.shaping import length_penalties, penalized


@dataclass(frozen=True)
class ReferenceAnswers:
    """Generates them in the step that needs them, with the frozen reference, and stores none.

    The paper (arXiv 2502.18770) draws them once for the whole set of prompts, from the SFT model that the policy starts
    from. The reference is that model for the whole run, and its sampling noise is a function of (seed, step, place), as
    the policy's is: the answers of a step are the same whenever they are drawn, so that a resumed run needs no file,
    only prompts that are drawn cost an answer, and a run that is made longer has answers to its further prompts, too.
    A prompt that is drawn again in a later epoch gets a fresh answer, of the same distribution.
    """

    engine: LocalEngine
    """Generates with the role `reference`, also where another engine answers for the policy: that one has the policy's
    weights."""
    answers_per_prompt: int
    missing_end_penalty: float
    length_penalty: LengthPenalty | None

    def answer(self, prompts: PromptSet, indices: np.ndarray, step: int) -> Rollout:
        """The reference's answers to the prompts of these indices (int64), the same on every rank; those to one prompt
        are consecutive."""
        return answer_prompts(
            self.engine,
            self.engine.roles.tokenizer,
            prompts,
            indices,
            answers_per_prompt=self.answers_per_prompt,
            step=step,
        )

    def compared(self, scores_R: np.ndarray, answers: Rollout, answers_per_prompt: int) -> np.ndarray:
        """What each answer of the policy is compared with, float64 [A, M]: the scores of the reference's answers to its
        prompt, less the same penalties that the policy's have.

        scores_R: of `answers`. answers_per_prompt: of the policy, consecutive.
        """
        penalties_R = length_penalties(answers.answer_lengths, self.length_penalty)
        penalized_R = penalized(scores_R, answers.ended, self.missing_end_penalty, penalties_R)
        return np.repeat(penalized_R.reshape(-1, self.answers_per_prompt), answers_per_prompt, axis=0)
