"""What is measured on held-out rows, and when."""

from typing import Literal

from pydantic import Field

from tuner.config.base import ConfigBase
from tuner.config.functions import Function


class EvaluationBase(ConfigBase):
    """When held-out rows are measured, and how many."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two measurements during training; None: ten over the run."""

    rows: int | None = Field(default=None, ge=1)
    """Measure at most so many held-out rows of a kind; None: all."""


class Validation(EvaluationBase):
    """When held-out rows are measured, and what follows from their loss."""

    patience: int | None = Field(default=None, ge=1)
    """Stop after so many measurements in a row without a better validation loss; None: never."""

    keep_best: bool = False
    """Keep the checkpoint with the best validation loss, and make it the model of the run."""


class Evaluation(Validation):
    """What is measured on held-out conversations or texts."""

    samples: int = Field(default=3, ge=0)
    """Prompts of the validation rows answered at each measurement, to be looked at."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Longest answer sampled or scored, in tokens."""

    score: Literal["exact"] | Function | None = None
    """How answers to the test rows are scored before and after: "exact" (equal text), or a function
    (answer, reference) -> float in 0..1; None: the test rows' loss only."""


class PairEvaluation(Validation):
    """What is measured on held-out preferences: the loss, and the report card at the end."""

    worst: int = Field(default=20, ge=0)
    """Pairs shown in the report card that the model has most wrong."""


class PolicyEvaluation(EvaluationBase):
    """What is measured on held-out prompts: the learned score, and a gold score by rule."""

    samples: int = Field(default=3, ge=0)
    """Held-out prompts whose answers are shown at each measurement, and answers of every step in rollouts.jsonl."""

    rule: Function | None = None
    """Gold score of an answer, which the policy never learns from: a function (answer, row) -> float in 0..1. The row
    holds the values of the prompt's row, and its "condition". None: the learned score only."""

    temperature: float = Field(default=0.0, ge=0)
    """Of the answers that are measured; 0: greedy."""
