"""What a policy stage is rewarded with: reward models, rules, and how their scores become rewards."""

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag

from tuner.config.base import ConfigBase
from tuner.config.functions import Function, is_function_reference
from tuner.config.model import Model


class Rule(ConfigBase):
    """A reward computed by code instead of a model."""

    function: Function
    """`file.py:name` of a module-level function (answer, row) -> float, where row (dict) holds the fields of the
    prompt's row and its "condition"."""

    weight: float = 1.0
    """Factor of its scores."""


class LengthPenalty(ConfigBase):
    """A penalty on the length of answers.

    With above = max_new_tokens - n and per_token = 1 / n it is DAPO's soft overlong punishment (arXiv 2503.14476).
    """

    per_token: float = Field(gt=0)
    """Subtracted from an answer's score for every token beyond `above`, its end token included."""

    above: int = Field(default=0, ge=0)
    """Length in tokens up to which an answer costs nothing."""


class PreferenceReward(ConfigBase):
    """A bounded, centered reward: how likely an answer is preferred to the reference policy's to the same prompt.

    The mean over the reference's answers of sigmoid(slope · (score - score of the reference's answer)): "Preference As
    Reward" (arXiv 2502.18770). It stays within 0 and 1 and grows fastest about the reference's own level, so that a
    high score is worth little more than a good one.
    """

    answers: int = Field(default=1, ge=1)
    """Answers of the reference policy to each prompt of a step; the paper needs no more than one."""

    slope: float = Field(default=1.0, gt=0)
    """Factor of the difference of two scores. At 1 the reward is the preference probability of a reward model that was
    trained on pairs (Bradley-Terry)."""


Combine = Literal["mean", "min", "mean_minus_variance"]
"""How the scores of several reward models become one (Coste et al., arXiv 2310.02743): their mean, the lowest
(worst-case optimization), or the mean less a coefficient times their variance (uncertainty-weighted optimization)."""


def as_model(value: Any) -> Any:
    """Accept a path in place of a model."""
    return {"path": value} if isinstance(value, str) else value


def as_reward(value: Any) -> Any:
    """Accept a function in place of a rule, and a path in place of a model."""
    if is_function_reference(value) or (callable(value) and not isinstance(value, ConfigBase)):
        return {"function": value}
    return as_model(value)


def as_rule(value: Any) -> Any:
    """Accept a function in place of a rule."""
    is_rule = isinstance(value, dict | Rule)
    return cast("Any", value) if is_rule else {"function": value}


def _reward_kind(value: Any) -> str:
    """Tag of the union's member: its class's name."""
    return "Rule" if isinstance(value, Rule) or (isinstance(value, dict) and "function" in value) else "Model"


Reward = Annotated[
    Annotated[Model, Tag("Model")] | Annotated[Rule, Tag("Rule")],
    Discriminator(_reward_kind),
    BeforeValidator(as_reward),
]
"""Source of the reward: a reward model, or a rule."""
