"""The page of a run in rounds, from the files of one written here; hostile answers stay texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.display.test_card_page import HOSTILE, SHOWN, Page
from tests.unit.display.written_rounds import MARKER, PATTERN, STEPS, written_rounds
from tuner.display.round_facts import PatchFacts, RunInRounds
from tuner.display.rounds_page import rounds_page
from tuner.display.rounds_tables import (
    kappas_table,
    labels_sentences,
    labels_table,
    patch_table,
    patterns_table,
    rounds_table,
    verdict,
)
from tuner.evaluation.intervals import Interval
from tuner.stages.cool.page import SHOWN as ANSWERS_SHOWN
from tuner.stages.cool.page import run_in_rounds
from tuner.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunInRounds:
    return run_in_rounds("cool", *written_rounds(tmp_path_factory.mktemp("runs") / "cool"))


def row(run: RunInRounds, name: str) -> list[Any]:
    """The cells of a row of the table of rounds."""
    return next(cells[1:] for cells in rounds_table(run)[1] if cells[0] == name)


def test_rounds_stand_side_by_side(run: RunInRounds):
    assert rounds_table(run)[0] == ["", "round 1", "round 2"]
    assert row(run, "gold score, before → after") == ["0.200 → 0.125", "0.200 → 0.600"]
    assert row(run, "KL, nats per token") == ["0.200", "0.100"]
    assert row(run, "reward model") == ["not patched", "patched"]
    assert row(run, "pairs, of them decided") == ["12, 10", "–"]
    # 17 to 20 of the 20 answers of the last four steps
    assert row(run, f"last answers with {PATTERN}")[0].startswith("92% [")


def test_what_a_patch_changed_is_in_sentences(run: RunInRounds):
    kind, sentences = verdict(run)
    assert kind == "good"
    patch, pattern, gold = sentences
    assert "70 labels beside 210 original rows; accuracy on original rows 0.900 before and 0.895" in patch
    assert pattern.endswith(": fewer")
    assert gold.endswith(": higher")


def test_a_fall_and_a_rollback_are_no_success(run: RunInRounds):
    first, second = run.rounds
    assert second.patch is not None
    refused = replace(second, patch=replace(second.patch, costs=["it costs too much"]))
    kind, sentences = verdict(replace(run, rounds=[first, refused]))
    assert kind == "remarks"
    assert "not taken: it costs too much" in sentences[0]
    assert row(replace(run, rounds=[first, refused]), "reward model")[1] == "rolled back"
    fallen = replace(run, rounds=[replace(first, gold_at_end=Interval(0.9, 0.8, 1.0)), second])
    assert verdict(fallen)[0] == "failed"


def test_intervals_that_overlap_tell_nothing_apart(run: RunInRounds):
    first, second = run.rounds
    share = {PATTERN: Interval(0.8, 0.7, 0.9)}
    same = replace(second, shares_at_end=share, gold_at_end=first.gold_at_end)
    kind, sentences = verdict(replace(run, rounds=[first, same]))
    assert kind == "remarks"
    assert [sentence.rpartition(": ")[2] for sentence in sentences[1:]] == ["not told apart"] * 2


def test_the_card_before_and_after_holds_every_group(run: RunInRounds):
    patch = run.rounds[1].patch
    assert isinstance(patch, PatchFacts)
    assert patch_table(patch)[1] == [
        ["all rows", 40, 0.9, 0.895, 1.5, 1.5],
        ["polite", 40, 0.9, 0.9, 1.5, 1.4],
        [f"labels of {PATTERN}", 12, 0.05, 0.975, -2.0, 2.25],
    ]


def test_patterns_are_followed_into_the_next_round(run: RunInRounds):
    (cells,) = patterns_table(run)[1]
    assert cells[:4] == [PATTERN, "1", "10%", "100%"]
    assert (cells[5][:2], cells[6]) == ("0%", "fewer")
    shares = dict(run.rounds[0].pattern_courses[PATTERN])
    assert (shares[1], shares[STEPS]) == (0.05, 1.0)


def test_labels_and_their_agreement(run: RunInRounds):
    assert labels_sentences(run) == ["round 1: labels decide 10 of 12 pairs; ties 1; contested 1"]
    names, rows = labels_table(run)
    by_annotator = {cells[1]: dict(zip(names, cells, strict=True)) for cells in rows}
    assert list(by_annotator) == ["all", "ann", "ben"]
    assert by_annotator["ben"]["left"] == "9%"
    assert "right on planted" not in names, "no pair was planted"
    ((*who, pairs, kappa),) = kappas_table(run)[1]
    # 11 of 12 alike; by chance (1 * 1 + 11 * 10) / 144
    assert (who, pairs, kappa) == (
        ["1", "ann and ben", "all"],
        12,
        pytest.approx((11 / 12 - 111 / 144) / (33 / 144)),
    )


def test_the_law_of_each_round_and_of_all(run: RunInRounds):
    own = run.rounds[0].signs.law
    assert own is not None
    assert own.turning_point is not None
    # 0.3 d - 0.6 d log d is largest at exp(0.3 / 0.6 - 1)
    assert own.turning_point.value == pytest.approx(0.607, abs=0.01)
    assert row(run, "gold score turns at √KL, by its own law")[0].startswith("0.61 [")
    assert run.law is not None
    page = rounds_page(run)
    assert "the gold score turns at distance 0.61" in page
    assert "Over-optimization over rounds" in page


def test_the_turning_point_of_a_later_round_is_its_own(tmp_path: Path):
    places, results = written_rounds(tmp_path, 1)
    moved = replace(places[0], number=2)
    places[0].folder.rename(moved.folder)
    (only,) = run_in_rounds("cool", [moved], [results[0] | {"round": 2}]).rounds
    page = rounds_page(RunInRounds("cool", [only], None, []))
    assert "Round 2 alone: " in page
    assert "the gold score turns at distance 0.61" in page
    assert "the run ended at 2.00, beyond it" in page


def test_worst_and_most_changed_answers(run: RunInRounds):
    first, second = run.rounds
    best = [prompt.answers[0] for prompt in first.best_without_gold]
    assert len(best) == ANSWERS_SHOWN
    assert all(answer.gold == 0 and MARKER in answer.text for answer in best)
    assert best[0].score == max(answer.score for answer in best)
    worst = [prompt.answers[0].score for prompt in second.worst_scored]
    assert worst == sorted(worst)
    assert worst[0] == 0
    (change,) = run.changes
    assert (change.rounds, change.measure) == ((1, 2), "gold")
    assert change.prompts == 41, "each step asks 20 of 50 prompts, 7 further ones than the step before"
    for prompt in change.risen:
        before, now = prompt.answers
        assert (before.round, now.round) == (1, 2)
        assert (before.gold, now.gold) == (0, 1)
        assert before.text.split()[0] == now.text.split()[0], "they answer the same prompt"


def test_without_gold_the_scores_are_compared(tmp_path: Path):
    run = run_in_rounds("cool", *written_rounds(tmp_path, alter={"gold": None}))
    (change,) = run.changes
    assert change.measure == "score"
    assert len(change.fallen) == ANSWERS_SHOWN, "all lose the score of the marker"
    assert [place.gold_at_end for place in run.rounds] == [None, None]
    assert run.rounds[0].best_without_gold == []
    assert "Scores, by the reward model of each round." in rounds_page(run)


def test_rounds_without_a_common_prompt_say_so(tmp_path: Path):
    places, results = written_rounds(tmp_path)
    file = places[1].policy.folder / "rollouts.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps(row | {"prompt_number": row["prompt_number"] + 1000}) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    assert "No prompt was answered at the end of both." in rounds_page(run_in_rounds("cool", places, results))


def bare(places: list[Any], results: list[dict[str, Any]]) -> None:
    """Take away all that a run may lack."""
    for place, result in zip(places, results, strict=True):
        for name in ("gold", "score"):
            del result[name]
        result |= {"kl": None, "hack": {}, "patterns": [], "patch": None, "labels": None}
        (place.policy.folder / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")


def one_answer(places: list[Any], results: list[dict[str, Any]]) -> None:
    """Leave one answer of each round."""
    for place in places:
        file = place.policy.folder / "rollouts.jsonl"
        file.write_text(file.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")


def no_answer(places: list[Any], results: list[dict[str, Any]]) -> None:
    for place in places:
        (place.policy.folder / "rollouts.jsonl").unlink()


@pytest.mark.parametrize("take_away", [bare, one_answer, no_answer])
def test_a_run_that_lacks_much_has_a_page(take_away: Callable[..., None], tmp_path: Path):
    places, results = written_rounds(tmp_path)
    take_away(places, results)
    page = rounds_page(run_in_rounds("cool", places, results))
    assert Page(page).open == []
    assert "Rounds side by side" in page
    assert not re.search(r"\bnan\b|None", page.replace("set evaluation.recorded_answers to None", ""))


def test_recorded_answers_are_read_once_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places, results = written_rounds(tmp_path)
    read, answers = list[Path](), RunFolder.answers.fget
    monkeypatch.setattr(RunFolder, "answers", property(lambda run: read.append(run.folder) or answers(run)))
    run_in_rounds("cool", places, results)
    assert read == [place.policy.folder for place in places]


def test_one_round_alone_compares_nothing(tmp_path: Path):
    run = run_in_rounds("cool", *written_rounds(tmp_path, 1))
    page = rounds_page(run)
    assert Page(page).open == []
    assert "<h1>cool: 1 round</h1>" in page
    assert verdict(run)[1] == []
    assert "Most changed" not in page


def test_the_page_loads_nothing_and_is_well_formed(run: RunInRounds):
    page = rounds_page(run)
    parsed = Page(page)
    assert parsed.open == []
    assert not re.search(r"https?:|url\(|@import|\bsrc=|href=|<script", page)
    plots = [values["aria-label"] for tag, values in parsed.tags if tag == "svg"]
    assert plots[:4] == [
        "Gold score of the rollouts",
        "Score of the rollouts",
        "KL from the reference",
        f"Answers that carry {PATTERN}",
    ]


def test_hostile_texts_stay_texts(tmp_path: Path):
    texts = {key: HOSTILE + key for key in ("answer", "condition", "origin", "prompt")}
    rows = texts | {"prompt": [{"role": "user", "content": texts["prompt"]}]}
    page = rounds_page(run_in_rounds("cool", *written_rounds(tmp_path, alter=rows)))
    assert Page(page).open == []
    for key in texts:
        assert SHOWN + key in page
    assert "<script" not in page


def test_hostile_names_stay_texts(run: RunInRounds):
    first, second = run.rounds
    (pattern,) = first.patterns
    renamed = replace(
        first,
        patterns=[replace(pattern, name=HOSTILE)],
        shares_at_end={HOSTILE: first.shares_at_end[PATTERN]},
        pattern_courses={HOSTILE: first.pattern_courses[PATTERN]},
    )
    after = replace(second, shares_at_end={HOSTILE: second.shares_at_end[PATTERN]})
    page = rounds_page(replace(run, name=HOSTILE, rounds=[renamed, after]))
    assert Page(page).open == []
    assert page.count(SHOWN) >= 6
    assert "<script" not in page
