"""The signs of over-optimization as people see them: sentences, tables, plots, and texts that cannot break a page."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.unit.display.test_card_page import HOSTILE, SHOWN, Page
from tests.unit.evaluation.test_over_optimization import written
from tuner.display.over_optimization_page import (
    over_optimization_html,
    over_optimization_terminal,
    rounds_html,
    sentences,
)
from tuner.evaluation.intervals import Interval
from tuner.evaluation.over_optimization.form import FormEffect
from tuner.evaluation.over_optimization.report import OverOptimization, law_over_rounds, over_optimization

EFFECT = FormEffect("no emphasis", 30, 120, Interval(-1.5, -2.0, -1.0), 0.75, Interval(0.0, -0.1, 0.1))


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> OverOptimization:
    return over_optimization(written(tmp_path_factory.mktemp("runs") / "run"))


def lines(signs: OverOptimization, *effects: FormEffect) -> str:
    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(over_optimization_terminal(signs, effects))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_the_signs_say(signs: OverOptimization):
    text = " ".join(lines(signs, EFFECT).split())
    assert "the gold score turns at distance 1.50" in text
    assert "the run ended at 3.00, beyond it" in text
    assert (
        "'so say the wise' stands in 48% of the answers of the last steps, 0% of those of the first and 100% of the "
        "best-scored; the gold score of answers with it is 0.00, of the others 0.95" in text
    )
    assert "no emphasis 30 of 120 −1.50 [−2.00, −1.00] +0.00 [−0.10, +0.10] 0.75" in text
    assert "and say the wise 2%" in text


def test_a_score_that_rises_while_gold_falls_is_said(tmp_path: Path):
    def falling(record: dict[str, float]) -> dict[str, float]:
        return record | {"gold": 0.5 - record["step"] / 100}

    (first, *_) = sentences(over_optimization(written(tmp_path / "run", falling)))
    assert first == (
        "the score rose from 0.31 to 2.81 and the gold score fell from 0.47 to 0.28: the policy exploits the reward"
    )


def test_a_run_that_an_alarm_ended_says_so(signs: OverOptimization):
    alarm = {"sign": "exploits", "step": 9, "action": "roll_back", "model_step": 5}
    (first, *_) = sentences(replace(signs, alarm=alarm))
    assert first == "the alarm 'exploits' ended the run after step 9; its model is that of step 5"
    (first, *_) = sentences(replace(signs, alarm={**alarm, "model_step": 9}))
    assert first.endswith("its model is the last step's")


def test_a_point_that_is_not_predicted_has_its_reason(signs: OverOptimization):
    assert signs.law is not None
    law = replace(signs.law, turning_point=None, no_turning_point="beta")
    refused = replace(signs, law=law)
    assert sentences(refused)[0] == "no turning point: beta"
    assert "turns at" not in over_optimization_html(refused)
    assert "no turning point: beta" in rounds_html([refused], law)


def test_the_plots_have_a_point_of_every_step_and_a_curve_of_every_round(
    signs: OverOptimization, tmp_path: Path
):
    page = over_optimization_html(signs)
    assert page.count('<circle class="dot s0"') == 2 * 24
    assert page.count("<svg") == 4
    rounds = [signs, over_optimization(written(tmp_path / "second"), 2)]
    page = rounds_html(rounds, law_over_rounds(rounds))
    assert page.count('<circle class="dot s1"') == 2 * 24
    assert page.count("<polyline") == 2
    assert ">round 2</text>" in page


def test_without_gold_or_answers_there_is_no_empty_plot(signs: OverOptimization):
    bare = replace(signs, points=[], golds_of_best=[], law=None, phrases=[], drifts=[], missing=["no gold"])
    page = over_optimization_html(bare)
    assert "<svg" not in page
    assert "no gold" in page
    assert "too few steps" in rounds_html([bare], law_over_rounds([bare]))


def test_hostile_phrases_stay_text(signs: OverOptimization):
    (course, *_) = signs.phrases
    phrase = replace(course.phrase, text=HOSTILE, mutants={HOSTILE: 0.5})
    page = over_optimization_html(replace(signs, phrases=[replace(course, phrase=phrase)], missing=[HOSTILE]))
    assert page.count(SHOWN) >= 3
    assert "<script" not in page
    assert Page(page).open == []
