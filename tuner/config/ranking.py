"""The ranking loss of reward models."""

from typing import Literal

from pydantic import Field

from tuner.config.base import ConfigBase


class FocalRanking(ConfigBase):
    """InternLM2's loss (arXiv 2403.17297, 4.2.1): focal ranking loss, and a penalty that keeps scores within bounds.

    With P = sigmoid(better - worse - margin), a pair's loss is -(1 - 2 max(0, P - 1/2))^gamma log P. It is averaged
    over the pairs of a prompt, then over prompts. `barrier` times the penalty, averaged over answers, is added.
    """

    gamma: float = Field(default=2.0, ge=0)
    """Focusing exponent: larger values down-weight pairs already ranked correctly; 0: plain Bradley-Terry loss."""

    penalty: Literal["log", "square"] = "log"
    """Penalty of a score x: "log" is -(log(bound + x) + log(bound - x)), continued as a parabola from 0.001 inside the
    bound, so that scores outside are pushed back; "square" is x squared."""

    bound: float = Field(default=5.0, gt=0.001, le=1000)
    """Scores should stay within ± this: the pole of the log penalty, and the limit checked by the report card."""

    barrier: float = Field(default=0.02, ge=0)
    """Coefficient of the penalty; 0: no penalty."""

    margin: float = Field(default=1.0, ge=0)
    """Scale of a row's "margin", the lead required of the better answer; 0: margins are ignored."""
