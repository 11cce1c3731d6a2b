"""What the loop decides: warnings, refusals, the order of saving and looking."""

import math

import pytest

from tuner.config import Evaluation
from tuner.errors import UserError
from tuner.training.counters import Counters, is_rising
from tuner.training.devices import Devices


@pytest.mark.parametrize(
    ("recent", "rising"),
    [
        ([(3.0, 2.0), (2.0, 2.1), (1.0, 2.2)], True),
        ([(3.0, 2.0), (2.0, 2.1), (1.0, 2.05)], False),  # fell again
        ([(3.0, 2.0), (3.5, 2.1), (1.0, 2.2)], False),  # training loss rose too: not memorizing
        ([(3.0, 2.0), (2.0, 2.1)], False),  # two are no trend
    ],
)
def test_memorizing_by_hand(recent, rising):
    assert is_rising(recent) is rising


def test_an_absent_gpu_is_said():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="torch sees no GPU here"):
        Devices(device="cuda")


def test_patience_and_the_best_by_hand():
    counters, limits = Counters(), Evaluation(patience=2, keep_best=True)
    messages = []
    for step, loss in enumerate([3.0, 2.0, 2.5, 0.0, 0.1, 0.2], start=1):
        counters.count(tokens=10, is_finite=True, loss=1.0 / step)
        messages += counters.judge(loss, limits)
        if counters.stopped_early:
            break
    assert (counters.best_loss, counters.best_step, counters.step, counters.tokens) == (0.0, 4, 6, 60)
    assert messages == [
        "validation loss rises while training loss falls: the model begins to memorize the rows",
        "no better validation loss in 2 measurements: stopping early",
    ]


def test_skipped_steps_are_counted_by_hand():
    counters = Counters()
    for loss in [1.0, math.nan, math.inf, 0.0, math.nan]:
        counters.count(tokens=1, is_finite=math.isfinite(loss), loss=loss)
    assert (counters.bad_steps, counters.bad_in_a_row, counters.losses) == (3, 1, [1.0, 0.0])
