"""Evaluation on held-out rows: when, and of what."""

from typing import Literal

from pydantic import Field

from tuner.config.base import ConfigBase
from tuner.config.functions import Function


class HeldOutEvaluation(ConfigBase):
    """How often held-out rows are evaluated, and on how many of them."""

    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations during training; None: about ten evaluations over the run, or fewer, so that they cost
    no more than a tenth of it."""

    rows: int | None = Field(default=None, ge=1)
    """Maximum number of rows evaluated, of the validation and of the test rows each; None: all."""


class Validation(HeldOutEvaluation):
    """Evaluation of the validation loss, early stopping, and the choice of the best checkpoint."""

    patience: int | None = Field(default=None, ge=1)
    """Early stopping: number of consecutive evaluations without a lower validation loss; None: off."""

    keep_best: bool = False
    """Keep the checkpoint with the lowest validation loss, and make it the model of the run."""


class Evaluation(Validation):
    """Evaluation on held-out conversations or texts."""

    samples: int = Field(default=3, ge=0)
    """Validation prompts answered at each evaluation, for inspection."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Maximum length of a generated answer, in tokens."""

    score: Literal["exact"] | Function | None = None
    """Score of answers to the test rows, before and after training: "exact" (exact match), or a function
    (answer, reference) -> float in 0..1; None: the test loss only."""


class PairEvaluation(Validation):
    """Evaluation on held-out preferences: the loss during training, and the report card at the end."""

    worst: int = Field(default=20, ge=0)
    """Number of worst-ranked pairs shown in the report card."""


class PolicyEvaluation(HeldOutEvaluation):
    """Evaluation on held-out prompts: the reward that is trained on, and a gold score computed by a rule."""

    samples: int = Field(default=3, ge=0)
    """Number of answers shown at each evaluation."""

    recorded_answers: int | None = Field(default=3, ge=0)
    """Number of answers of each rollout kept in rollouts.jsonl, which `tuner score` reads: its first; None: all."""

    rule: Function | None = None
    """Gold score of an answer, never trained on: a function (answer, row) -> float in 0..1, where row (dict) holds the
    fields of the prompt's row and its "condition"; None: the trained reward only."""

    rule_on_rollouts: bool = True
    """The rule also scores every rollout, which shows early where the trained reward departs from it; False: held-out
    prompts only, where the rows of training prompts lack what it reads."""

    keep_best: Literal["gold", "score"] | None = None
    """Keep the checkpoint with the highest held-out gold score, or trained score, and make it the model of the run."""

    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of evaluated answers; 0: greedy decoding."""
