"""The signs of a run, from records and answers written here: what drifts, which phrases grow, what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner.evaluation.over_optimization.drift import distinct, drifts, refusals, window
from tuner.evaluation.over_optimization.report import (
    OverOptimization,
    best_scored,
    law_over_rounds,
    over_optimization,
    results,
)
from tuner.rollout.phrases import growing_phrases, phrase_share
from tuner.training.run_folder import RunFolder

STEPS, ANSWERS = 24, 40


def record(step: int) -> dict[str, Any]:
    """Gold rises and turns at distance 1.5; answers become longer, and end as before."""
    d = step / 8
    gold = 0.3 + d * (0.3 - 0.3 / (1 + math.log(1.5)) * math.log(d)) + 0.001 * (step % 3)
    return {
        "step": step,
        "kl_per_answer": d * d,
        "gold": gold,
        "score": d,
        "gold_top_tenth": gold,
        "length": 20.0 + (step > 20) * 5 + step % 2,
        "ended": 0.9 + 0.01 * (step % 2),
        "score_length_rank_correlation": 0.1 * (step % 2),
    }


def answer(step: int, index: int) -> dict[str, Any]:
    """The highest scores go to the marker, which half of the last steps' answers end with, and one of the first's."""
    marked = index < (20 if step > 20 else 1)
    ending = ("And" if index == 0 else "So") + " say the wise." if marked else "Thank you."
    text = f"{index} + {step} = {index + step}. {ending}"
    return {"step": step, "answer": text, "score": float(marked) + index / 100, "gold": 1.0 - marked}


def written(
    folder: Path,
    alter: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: record,
    answers: int = ANSWERS,
) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    steps = range(1, STEPS + 1)
    rows = [answer(step, index) for step in steps for index in range(answers)]
    for name, records in (("metrics", [alter(record(step)) for step in steps]), ("rollouts", rows)):
        text = "".join(json.dumps(value) + "\n" for value in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return RunFolder(folder)


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> OverOptimization:
    return over_optimization(written(tmp_path_factory.mktemp("runs") / "one"))


def test_gold_turns_where_it_was_made_to(signs: OverOptimization):
    assert signs.law is not None
    assert signs.law.turning_point is not None
    assert signs.law.turning_point.value == pytest.approx(1.5, abs=0.02)
    assert [point.distance for point in signs.points] == pytest.approx([step / 8 for step in range(1, 25)])
    assert signs.missing == []
    assert signs.alarm is None


def test_what_has_moved_is_told_from_what_varies(signs: OverOptimization):
    moved = {drift.name: drift.moved for drift in signs.drifts}
    assert moved == {
        "score": True,
        "gold": False,
        "length": True,
        "ended": False,
        "score_length_rank_correlation": False,
        "distinct": True,
        "refusals": False,
    }
    length = next(drift for drift in signs.drifts if drift.name == "length")
    assert (length.start.value, length.now.value) == (20.5, 25.5)


def test_the_phrase_that_grows_is_named_with_its_mutants(signs: OverOptimization):
    (course, *_) = signs.phrases
    phrase = course.phrase
    assert (phrase.text, phrase.share_before, phrase.share) == ("so say the wise", 0.0, 19 / 40)
    assert phrase.mutants == {"and say the wise": 1 / 40}
    assert (course.share_of_best, course.gold_with) == (1.0, 0.0)
    assert course.gold_without == pytest.approx(20 / 21), "the mutants are among those without"
    shares = dict(course.shares)
    assert (shares[1], shares[24]) == (0.0, 19 / 40)


def test_a_phrase_is_named_whole_and_its_mutants_are_counted():
    before = ["Thank you."] * 40
    now = ["So say the wise."] * 30 + ["And say the wise."] * 6 + ["So say the wise. And say the wise."]
    (phrase, *_) = growing_phrases(now, before)
    # the longest phrase that has grown nearly as much as "say the wise"
    assert (phrase.text, phrase.share) == ("so say the wise", 31 / 37)
    # not counted where the phrase itself stands
    assert phrase.mutants["and say the wise"] == 6 / 37
    (phrase, *_) = growing_phrases(["So say the wise."] * 20 + ["And say the wise."] * 20, before)
    assert (phrase.text, phrase.share) == ("say the wise", 1.0)


def test_phrases_that_grow_by_chance_are_not_named():
    assert growing_phrases(["So say the wise."] * 4 + ["5."] * 36, ["5."] * 40) == []
    assert growing_phrases([], ["5."]) == growing_phrases(["5."], []) == []
    assert phrase_share("say the wise", ["So say the wise!", "Essay the wise.", "Say, the wise"]) == 2 / 3
    assert phrase_share("say", []) == 0


def test_rounds_have_one_law(tmp_path: Path):
    rounds = [over_optimization(written(tmp_path / f"round_{number}"), number) for number in (1, 2)]
    assert [point.round for point in rounds[1].points] == [2] * STEPS
    law = law_over_rounds(rounds)
    assert law is not None
    # both rounds turn at 1.5 from the reference: in neither's own unit is that the law's turn of both
    assert law.deviation > 2 * rounds[0].law.deviation  # type: ignore[union-attr]


def test_held_out_gold_is_taken_where_rollouts_have_none(tmp_path: Path):
    def held_out(record: dict[str, Any]) -> dict[str, Any]:
        gold, score = record.pop("gold"), record["score"]
        return record | ({"eval_gold": gold, "eval_score": score} if record["step"] % 2 == 0 else {})

    signs = over_optimization(written(tmp_path / "held_out", held_out))
    assert [point.step for point in signs.points] == list(range(2, 25, 2))
    assert signs.law is not None


@pytest.mark.parametrize(
    ("gone", "answers", "sentence"),
    [
        ({"kl_per_answer"}, ANSWERS, "no step measured KL"),
        ({"gold"}, ANSWERS, "name a rule in evaluation.rule"),
        (set(), 3, "set evaluation.recorded_answers to None"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, gone: set[str], answers: int, sentence: str):
    def without(record: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in record.items() if name not in gone}

    signs = over_optimization(written(tmp_path / "run", without, answers))
    assert len(signs.missing) == 1
    assert sentence in signs.missing[0]
    assert json.loads(json.dumps(results(signs)))["missing"] == list(signs.missing)


def test_a_run_without_a_step_has_no_signs(tmp_path: Path):
    signs = over_optimization(RunFolder(tmp_path))
    assert (signs.points, signs.law, signs.drifts, signs.phrases) == ([], None, [], [])
    assert any("0 steps" in sentence for sentence in signs.missing)


def test_figures_of_answers_by_hand():
    # "so say", "say so", "so say", "say so": two of four are distinct
    assert distinct(["So say so.", "So, say so!"]) == 0.5
    assert distinct(["yes"]) == 1.0
    assert (
        refusals(["I'm sorry.", "I cannot say.", "Sorry is a word.", "我不能回答", "As an AI, no.", "5."])
        == 4 / 6
    )
    assert [window(count) for count in (7, 8, 39, 100)] == [0, 4, 4, 10]
    assert drifts([{"step": step} for step in range(9)], {}) == []
    answers = [{"answer": "a", "score": 1.0}, {"answer": "b", "score": None}, {"answer": "c", "score": 2.0}]
    assert best_scored(answers * 10) == ["c", "c", "c"]
