"""What a pair of answers costs a reward model."""

from typing import Literal

from pydantic import Field

from tuner.config.base import ConfigBase


class FocalRanking(ConfigBase):
    """InternLM2's loss (arXiv 2403.17297, 4.2.1): focal ranking, and a penalty that keeps scores within bounds.

    With P = sigmoid(better - worse - margin): -(1 - 2 max(0, P - 1/2))^gamma log P, a prompt counting once,
    plus `barrier` times the mean penalty of the answers, each counting once.
    """

    gamma: float = Field(default=2.0, ge=0)
    """How little pairs that are right already count; 0: plain ranking (Bradley-Terry)."""

    penalty: Literal["log", "square"] = "log"
    """"log": -(log(bound + x) + log(bound - x)), going on as a parabola from 0.001 before the bound outwards, so that
    a score outside is pushed back; "square": x squared."""

    bound: float = Field(default=5.0, gt=0.001, le=1000)
    """Scores are to stay within plus and minus this: the log penalty's pole, and what the report card holds them to."""

    barrier: float = Field(default=0.02, ge=0)
    """Weight of the penalty; 0: none."""

    margin: float = Field(default=1.0, ge=0)
    """Factor on a row's own "margin", by which the better answer must lead; 0: margins are ignored."""
