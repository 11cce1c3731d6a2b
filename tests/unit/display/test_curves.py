"""The curves of a run: one PNG, whatever the records hold."""

import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuner.display.curves import curves_png, draw, draw_curves
from tuner.display.panels import centered, count, usual
from tuner.stages.rl.figures import figures
from tuner.stages.sft.figures import FIGURES as SFT

PPO = figures("ppo", critic=True)


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
    draw_curves(metrics, path, "run with $signs$ and_underscores", SFT)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1430, 806)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_drawn_is_what_was_recorded() -> None:
    figure = draw(RUNS["a run"], "run", SFT)
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
    loss = draw(RUNS["skipped steps"], "run", SFT).axes[0]
    raw, _, skipped = loss.lines
    assert list(raw.get_xdata()) == [2]
    assert list(skipped.get_xdata()) == [1, 3]
    assert skipped.get_label() == "skipped (2)"


def test_the_mean_does_not_lag_behind_a_straight_line() -> None:
    line = [10.0 - 0.1 * step for step in range(101)]
    assert centered(line, 10)[50] == pytest.approx(line[50])


def test_a_few_values_are_their_own_mean() -> None:
    assert centered([3.0, 0.0, 1.0], 0.1) == [3.0, 0.0, 1.0]


def test_the_mean_of_two_values_by_hand() -> None:
    # weights 1 for itself and 1/2 for its neighbour
    assert centered([3.0, 0.0], 2) == pytest.approx([3 / 1.5, 1.5 / 1.5])


def test_a_spike_of_a_long_run_leaves_the_picture_and_the_usual_stays() -> None:
    low, high = usual([1.0, 2.0] * 50 + [1000.0])
    assert (low, high) == (1.0, 2.5)
    assert usual([1.0, 1000.0]) == (1.0, 1000.0)


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
    assert count(value) == text


def test_pyplot_is_left_alone_and_importing_costs_nothing() -> None:
    program = (
        "import sys, tuner.display.curves as curves, tuner.stages.rl.figures as rl, tuner.stages.sft.figures\n"
        "assert not {'matplotlib', 'torch'} & sys.modules.keys()\n"
        "curves.curves_png([], 'x', rl.figures('ppo', critic=True))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_bytes_for_notebooks() -> None:
    assert curves_png(RUNS["one record"], "run", SFT).startswith(b"\x89PNG")


# PPO


def _policy(step: int, **more: float | None) -> dict[str, Any]:
    record = {"step": step, "tokens": 2048 * step, "loss": 0.4, "policy_loss": -0.01, "value_loss": 0.8,
              "score": 0.1 * step, "kl": 0.001 * step, "length": 100.0, "ended": 0.9, "entropy": 1.5,
              "explained_variance": 0.5, "grad_norm_policy": 0.1, "grad_norm_critic": 5.0, "clipped": 0.0,
              "seconds": 3.0}  # fmt: skip
    return record | more


def _warm(step: int, **more: float | None) -> dict[str, Any]:
    return _policy(step, policy_loss=None, grad_norm_policy=None, clipped=None, **more)


SKIPPED = dict.fromkeys(_policy(0).keys() - {"step", "tokens", "seconds"})
FOUR = ("helpful", "harmless", "polite", "costs $5 or a name that is long")


def _by_condition(names: tuple[str, ...], **more: float) -> dict[str, float]:
    return {f"score/{name}": float(place) for place, name in enumerate(names)} | more


POLICY_RUNS = {
    "a run": [_policy(step, **({"eval_gold": 0.5} if step % 5 == 0 else {})) for step in range(1, 31)],
    "warm-up": [(_warm if step <= 5 else _policy)(step) for step in range(1, 31)],
    "nothing but warm-up": [_warm(1), _warm(2)],
    "one record": [_policy(1)],
    "skipped steps": [_policy(1), _policy(2, **SKIPPED), _policy(3)],
    "only skipped steps": [_policy(1, **SKIPPED), _policy(2, **SKIPPED)],
    "few names": [{"step": 1, "score": 1.0, "kl": 0.0}, {"step": 2, "score": 1.0, "kl": 0.0}],
    "conditions": [_policy(step, **_by_condition(FOUR)) for step in range(1, 9)],
    "conditions, at times": [_policy(1, **_by_condition(FOUR[:1])), _policy(2, **_by_condition(FOUR[1:]))],
    "gold by condition": [
        _policy(1), _policy(2, eval_gold=0.5, **_by_condition(FOUR), **{"eval_gold/polite": 0.25}),
    ],
    "gold of rollouts": [_policy(step, gold=0.5, gold_top_tenth=[1.0, None, 0.0][step - 1]) for step in (1, 2, 3)],
    "everything": [
        _policy(step, clipped=0.1, replay_loss=2.0, eval_replay_loss=2.1, eval_gold=0.5, eval_score=0.2,
                **_by_condition(FOUR)) for step in (1, 2, 3)
    ],
    "no critic worth the name": [_policy(step, explained_variance=-50.0) for step in (1, 2)],
    "zeros": [_policy(step, **dict.fromkeys(SKIPPED, 0.0)) for step in (1, 2)],
    "not finite": [_policy(1, score=math.nan, kl=math.inf), _policy(2, grad_norm_critic=math.inf), _policy(3)],
}  # fmt: skip


def _titles(metrics: list[dict[str, Any]]) -> list[str]:
    return [axes.get_title(loc="left") for axes in draw(metrics, "run", PPO).axes]


@pytest.mark.parametrize("metrics", POLICY_RUNS.values(), ids=POLICY_RUNS)
@pytest.mark.filterwarnings("error")
def test_any_run_of_ppo_makes_a_picture(metrics: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_curves(metrics, tmp_path / "curves.png", "run", PPO)
    assert struct.unpack(">II", (tmp_path / "curves.png").read_bytes()[16:24]) == (1690, 962)


def test_what_ppo_shows_is_what_there_is() -> None:
    always = [
        "KL to the reference, per token",
        "entropy, nats per token",
        "answer length, tokens",
        "answers that ended",
        "explained by the critic",
        "gradient norm",
    ]
    assert _titles(POLICY_RUNS["warm-up"]) == ["score by the reward model", *always]
    assert _titles(POLICY_RUNS["a run"]) == ["score by the reward model", "gold score, held out", *always]
    everything = ["score by the reward model", "gold score, held out", "score by condition", *always]
    assert _titles(POLICY_RUNS["everything"]) == [
        *everything,
        "share of answer tokens clipped",
        "replay loss",
    ]
    assert "explained by the critic, cut at -1" in _titles(POLICY_RUNS["no critic worth the name"])
    assert "value loss" in _titles([_policy(1, explained_variance=None)])
    assert _titles([_policy(1, clipped=0.1)])[-1] == "seconds per step", "an odd number would leave a gap"


def test_the_score_is_drawn_with_its_mean_and_what_was_held_out() -> None:
    records = [_policy(step, **({"eval_score": 1.0} if step == 3 else {})) for step in (1, 2, 3)]
    raw, mean, held_out = draw(records, "run", PPO).axes[0].lines
    assert list(raw.get_ydata()) == pytest.approx([0.1, 0.2, 0.3])
    # the mean looks three steps around at least: weights 1, 2/3, 4/9
    expected = (0.1 + 0.2 * 2 / 3 + 0.3 * 4 / 9) / (1 + 2 / 3 + 4 / 9)
    assert mean.get_ydata()[0] == pytest.approx(expected)
    assert (list(held_out.get_xdata()), held_out.get_label()) == ([3], "held out")


def test_gold_of_the_best_scored_is_drawn_beside_that_of_all() -> None:
    panel = draw(POLICY_RUNS["gold of rollouts"], "run", PPO).axes[2]
    assert panel.get_title(loc="left") == "rollout gold"
    every, _, tenth, _ = panel.lines
    assert (list(every.get_ydata()), list(tenth.get_ydata())) == ([0.5] * 3, [1.0, 0.0])
    assert panel.get_legend_handles_labels()[1] == ["all", "best tenth"]
    assert panel.get_ylim() == (0, 1.05)


def test_the_gold_score_names_its_best() -> None:
    records = [_policy(step, eval_gold=gold) for step, gold in ((1, 0.25), (2, 0.75), (3, 0.5))]
    gold = draw(records, "run", PPO).axes[1]
    assert [text.get_text() for text in gold.texts] == ["best 0.750"]


def test_each_condition_has_a_line_and_one_or_too_many_have_none() -> None:
    legend = draw(POLICY_RUNS["conditions"], "run", PPO).axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        *("helpful", "harmless", "polite"), r"costs \$5 or a nam…",
    ]  # fmt: skip
    for names in (("one",), tuple("abcdefg")):
        assert "score by condition" not in _titles([_policy(1, **_by_condition(names))])


def test_gold_and_score_of_a_condition_look_alike() -> None:
    _, gold, score, *_ = draw(POLICY_RUNS["gold by condition"], "run", PPO).axes
    assert gold.lines[0].get_color() == score.lines[FOUR.index("polite")].get_color()


def _shaded(metrics: list[dict[str, Any]]) -> list[tuple[float, float]]:
    patches = draw(metrics, "run", PPO).axes[0].patches
    return [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in patches]  # type: ignore[attr-defined]


def test_the_critics_warm_up_is_shaded_in_every_panel_and_named_once() -> None:
    figure = draw(POLICY_RUNS["warm-up"], "run", PPO)
    assert all(len(axes.patches) == 1 for axes in figure.axes)
    assert _shaded(POLICY_RUNS["warm-up"]) == [(0.5, 5.5)]
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["critic warm-up"]


def test_a_skipped_step_is_no_warm_up_but_may_lie_in_one() -> None:
    assert _shaded(POLICY_RUNS["skipped steps"]) == []
    assert _shaded([_warm(1), _policy(2, **SKIPPED), _warm(3), _policy(4)]) == [(0.5, 3.5)]
    skipped = draw(POLICY_RUNS["skipped steps"], "run", PPO).axes[0].lines[-1]
    assert (list(skipped.get_xdata()), skipped.get_label()) == ([2], "skipped (1)")


def test_norms_that_differ_much_are_in_powers_of_ten() -> None:
    assert draw(POLICY_RUNS["a run"], "run", PPO).axes[-1].get_yscale() == "log"
    assert draw([_policy(1, grad_norm_policy=4.0)], "run", PPO).axes[-1].get_yscale() == "linear"
