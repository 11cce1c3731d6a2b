"""A model that is none is refused."""

import math
from pathlib import Path

import pytest
import torch

from tuner.errors import DivergedError, UserError
from tuner.training.divergence import refuse_measures, refuse_weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite(value):
    sound = {"a": torch.ones(2), "b": torch.ones(2, 2)}
    refuse_weights(Path("run"), sound)
    with pytest.raises(
        DivergedError, match="run: this run has diverged: 1 of its 2 weights are not finite, such as b"
    ):
        refuse_weights(Path("run"), sound | {"b": torch.tensor([1.0, value])})


@pytest.mark.parametrize(
    ("results", "name"),
    [
        ({"before": {"loss": 2.0}, "after": {"score": None, "loss": math.nan}}, "after.loss"),
        (
            {"conditions": {"polite": {"gold": {"before": 0.5, "after": math.inf}}}},
            "conditions.polite.gold.after",
        ),
    ],
)
def test_a_measure_that_is_not_finite(results, name):
    with pytest.raises(DivergedError, match=f"{name} is (nan|inf) on held-out rows"):
        refuse_measures(Path("run"), results)


def test_what_was_so_before_is_no_divergence():
    refuse_measures(
        Path("run"), {"before": {"loss": math.nan}, "after": {"loss": 2.0, "score": None}, "kl": math.nan}
    )


def test_its_exit_code_is_its_own():
    assert (UserError.exit_code, DivergedError.exit_code) == (2, 3)
