"""The curves of a run: one PNG, whatever the records hold."""

import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuner.training.curves import _centred, _count, _usual, curves_png, draw, draw_curves


def _record(step: int, **more: float | None) -> dict[str, Any]:
    return {"step": step, "tokens": 2048 * step, "loss": 2 + 1 / step, "lr": 1e-4, "grad_norm": 1.0,
            "tokens_per_second": 4e4} | more  # fmt: skip


RUNS = {
    "a run": [_record(step, **({"eval_loss": 2.5} if step % 5 == 0 else {})) for step in range(1, 31)],
    "one record": [_record(1)],
    "nothing yet": [],
    "skipped steps": [_record(1, loss=None, grad_norm=None), _record(2), _record(3, loss=None)],
    "only skipped steps": [_record(1, loss=None), _record(2, loss=None)],
    "all alike": [_record(step, loss=1.0) for step in range(1, 4)],
    "few names": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}],
    "zeros": [_record(step, loss=0.0, lr=0.0, grad_norm=0.0) for step in (1, 2)],
    "not finite": [_record(1, loss=math.nan), _record(2, loss=math.inf), _record(3)],
    "going on": [_record(step) for step in range(1000, 1003)],
}


@pytest.mark.parametrize("metrics", RUNS.values(), ids=RUNS)
@pytest.mark.filterwarnings("error")
def test_any_run_makes_a_picture(metrics: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw_curves(metrics, path, "run with $signs$ and_underscores")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1430, 806)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_drawn_is_what_was_recorded() -> None:
    figure = draw(RUNS["a run"], "run")
    loss, lr, norm, speed = figure.axes
    assert [axes.get_title(loc="left") for axes in (loss, lr, norm, speed)] == [
        "loss",
        "learning rate",
        "gradient norm",
        "tokens per second",
    ]
    raw, mean, held_out = loss.lines
    assert list(raw.get_ydata()) == [2 + 1 / step for step in range(1, 31)]
    assert mean.get_label() == "training"
    assert list(held_out.get_xdata()) == [5, 10, 15, 20, 25, 30]
    assert [text.get_text() for text in loss.texts] == ["best 2.500"]


def test_skipped_steps_are_marked_and_not_drawn_as_losses() -> None:
    loss = draw(RUNS["skipped steps"], "run").axes[0]
    raw, _, skipped = loss.lines
    assert list(raw.get_xdata()) == [2]
    assert list(skipped.get_xdata()) == [1, 3]
    assert skipped.get_label() == "skipped (2)"


def test_the_mean_does_not_lag_behind_a_straight_line() -> None:
    line = [10.0 - 0.1 * step for step in range(101)]
    assert _centred(line, 10)[50] == pytest.approx(line[50])


def test_a_few_values_are_their_own_mean() -> None:
    assert _centred([3.0, 0.0, 1.0], 0.1) == [3.0, 0.0, 1.0]


def test_the_mean_of_two_values_by_hand() -> None:
    # weights 1 for itself and 1/2 for its neighbour
    assert _centred([3.0, 0.0], 2) == pytest.approx([3 / 1.5, 1.5 / 1.5])


def test_a_spike_of_a_long_run_leaves_the_picture_and_the_usual_stays() -> None:
    low, high = _usual([1.0, 2.0] * 50 + [1000.0])
    assert (low, high) == (1.0, 2.5)
    assert _usual([1.0, 1000.0]) == (1.0, 1000.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.25, "1.25"),
        (0.0002, "2e-4"),
        (0.00018, "1.8e-4"),
        (45_000, "45k"),
        (1.2e6, "1.2M"),
        (3e9, "3G"),
    ],
)
def test_ticks_are_short(value: float, text: str) -> None:
    assert _count(value) == text


def test_pyplot_is_left_alone_and_importing_costs_nothing() -> None:
    program = (
        "import sys, tuner.training.curves as curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        "curves.curves_png([], 'x')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_bytes_for_notebooks() -> None:
    assert curves_png(RUNS["one record"], "run").startswith(b"\x89PNG")
