"""What every field of a run in rounds changes, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.rollout.test_ensemble import PROMPTS, ensemble
from tests.unit.rollout.test_ensemble import rule as number_rule
from tuner.config import COOL, Candidates, Model, Patch, Preferences, Source, load_config, override
from tuner.data.draw_rows import apportion, draw_rows
from tuner.errors import UserError
from tuner.evaluation.report_card.card import Ranking
from tuner.feedback.queue import drawn_unit
from tuner.stages.context import Context
from tuner.stages.cool.candidates import _drawn_prompts, pair_scores
from tuner.stages.cool.collect import collect_labels
from tuner.stages.cool.contradiction import rejected_patterns
from tuner.stages.cool.labels import LabeledPairs, labels_before
from tuner.stages.cool.pairs import AnswerPair, PolicyAnswer, fast_pairs, slow_pairs
from tuner.stages.cool.patch import RECORD, Patched, _best, _rows, _run_config, model_of
from tuner.stages.cool.patch_card import ALL, PatchCard, costs
from tuner.stages.cool.patch_rows import PatchRows, read_patch_rows, write_patch_rows
from tuner.stages.cool.patterns import Pattern, find_patterns, start_and_end
from tuner.stages.cool.rounds import RoundPlace, policy_config, rounds_of
from tuner.stages.run import Run
from tuner.training.devices import Devices
from tuner.training.watchers import Watchers

MARKER = " So say the wise."
PATTERN = Pattern('"so say the wise"', share=0.9, share_before=0.0)


def cool(changes: dict[str, Any] | None = None) -> COOL:
    config = load_config("quickstart_cool")
    assert isinstance(config, COOL)
    return override(config, changes or {})


def second(config: COOL, folder: Path = Path("runs/cool")) -> RoundPlace:
    return rounds_of(config, folder)[1]


def rows(count: int) -> PatchRows:
    return PatchRows([Source(path="labels.jsonl")], {"p": "held_out.jsonl"}, count, 0, 0, {})


def test_round_fields() -> None:
    config = cool({"rounds.1.steps": 7})
    again = policy_config(config, second(config), Model(path="runs/patched"), "runs/first")
    assert (again.max_steps, again.reward_model.path) == (7, "runs/patched")  # type: ignore[union-attr]
    assert (again.policy.path, again.reference) == ("runs/quickstart_cool_sft", None)
    assert again.checkpoint.milestones == {"early": 0.25, "middle": 0.5}
    assert again.evaluation.recorded_answers == 64
    config = cool({"rounds.1.start": "continue", "seed": 5})
    onward = policy_config(config, second(config), Model(path="runs/patched"), "runs/first")
    assert onward.policy.path == "runs/first"
    assert onward.reference is not None
    assert onward.reference.path == "runs/quickstart_cool_sft"
    assert onward.seed == config.policy.seed + 5


def test_max_steps_are_those_of_all_rounds(tmp_path: Path) -> None:
    config = cool({"max_steps": 10, "rounds.0.steps": 6, "rounds.1.steps": 6})
    first, then = rounds_of(config, tmp_path)
    first.policy.folder.mkdir(parents=True)
    (first.policy.folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, 7)))
    assert policy_config(config, first, Model(path="runs/r"), None).max_steps == 6
    assert policy_config(config, then, Model(path="runs/r"), None).max_steps == 4


def test_patch_fields(tmp_path: Path) -> None:
    changes = {"steps": 9, "epochs": 2.0, "lr": 3e-4}
    config = cool({f"rounds.1.patch.{name}": value for name, value in changes.items()})
    run = _run_config(config, second(config), Model(path="runs/first_reward"), rows(4))
    assert (run.max_steps, run.epochs, run.optimizer.lr) == (9, 2.0, 3e-4)
    assert run.model.path == "runs/first_reward"
    assert [source.path for source in run.data.sources] == ["labels.jsonl"]
    assert [source.path for source in run.data.test_sources] == ["tuner:cool/test.jsonl", "held_out.jsonl"]
    assert run.checkpoint.milestones == {}
    config = cool({"rounds.1.patch.start": "restart", "rounds.1.patch.lr": None})
    run = _run_config(config, second(config), Model(path="runs/first_reward"), rows(4))
    assert (run.model.path, run.optimizer.lr) == ("tuner:tiny", config.reward.optimizer.lr)
    labels = LabeledPairs(
        [{"prompt": f"{n} + 1", "chosen": "a", "rejected": "b", "pattern": "p"} for n in range(40)], 3
    )
    patch = Patch(original=2, weight=0.5, held_out=0.25)
    written = write_patch_rows(labels, config.reward, patch, tmp_path / "rows", seed=0)
    assert 4 <= 40 - written.labels <= 16
    assert written.original == 2 * written.labels
    assert [source.weight for source in written.train] == [0.5, 1.0]
    assert written.left_out == 3
    assert len(Path(written.test["p"]).read_text().splitlines()) == 40 - written.labels
    assert read_patch_rows(tmp_path / "rows") == written
    assert write_patch_rows(labels, config.reward, Patch(held_out=0), tmp_path / "all", seed=0).labels == 40


def test_the_first_reward_model_is_loaded_as_the_config_says(tmp_path: Path) -> None:
    """With its revision and its trust; what is patched from it keeps the trust, for policies and for its cards."""
    changes = {"policy.reward": {"path": "org/reward", "revision": "v2", "trust_remote_code": True}}
    config = cool(changes)
    place, first = second(config, tmp_path), config.policy.reward_model
    assert first is not None
    assert policy_config(config, place, first, None).reward_model == first
    assert _run_config(config, place, first, rows(4)).model == first
    place.reward.folder.mkdir(parents=True)
    place.reward.save_json(RECORD, {"model": "a folder that was moved", "share": 0.5})
    average = Model(path=str(place.reward.folder / "average_0.5"), trust_remote_code=True)
    assert model_of(config, place) == average


def card(accuracy: float, margin: float, labels: float) -> PatchCard:
    original = {ALL: Ranking(accuracy, 2.0, 100), "polite": Ranking(accuracy, margin, 100)}
    return PatchCard(original, {"p": Ranking(labels, 0.5, 10)})


def test_limits_of_a_patch() -> None:
    before, patch = card(0.9, 2.0, 0.2), Patch(max_accuracy_loss=0.05, min_margin=0.5)
    assert costs(before, card(0.86, 1.1, 0.9), patch) == []
    assert "falls from 0.900 to 0.840" in costs(before, card(0.84, 1.1, 0.9), patch)[0]
    assert "the mean margin of polite falls from 2.00 to 0.90" in costs(before, card(0.9, 0.9, 0.9), patch)[0]
    assert costs(before, card(0.9, -1.0, 0.9), Patch(min_margin=None)) == []
    assert PatchCard.from_dict(json.loads(json.dumps(before.to_dict()))) == before


def test_the_average_that_ranks_most_labels_within_the_limits_is_taken() -> None:
    choices = [
        Patched("whole", 1.0, card(0.5, 1.0, 1.0), ["too much"]),
        Patched("half", 0.5, card(0.9, 1.0, 0.8), []),
        Patched("quarter", 0.25, card(0.9, 1.0, 0.4), []),
    ]
    assert _best(choices).path == "half"
    assert _best(choices[:1]).costs == ["too much"]


def answers(prompts: int) -> list[PolicyAnswer]:
    """Of each prompt an answer by three policies; the last one's carries the marker, and scores by its prompt."""
    return [
        PolicyAnswer(n, f"{n} {policy}.{MARKER if policy == 'last' else ''}", policy, float(n))
        for n in range(prompts)
        for policy in ("start", "early", "last")
    ]


def test_candidates_fields(tmp_path: Path) -> None:
    config = cool({"candidates.prompts": 5, "candidates.answers": 3})
    drawn = _drawn_prompts(config, second(config), 100)
    assert len(drawn) == 15
    assert len(set(drawn.tolist())) == 5
    slow = slow_pairs(answers(10), Candidates(slow=14), seed=0)
    assert len(slow) == 14
    assert len({pair.first.prompt for pair in slow[:10]}) == 10, (
        "every prompt comes once before any comes twice"
    )
    assert all(pair.first.policy != pair.second.policy for pair in slow)
    fast = fast_pairs(PATTERN, answers(10), Candidates(fast=6, minimal=0.5), seed=0)
    minimal = [pair for pair in fast if pair.second.policy == "last, rewritten"]
    assert (len(fast), len(minimal)) == (6, 3)
    assert all(pair.first.text == f"{pair.second.text}{MARKER}" for pair in minimal)
    early = [pair for pair in fast if pair not in minimal]
    assert [pair.first.prompt for pair in early] == [9, 8, 7], "the best-scored first"
    assert {pair.second.policy for pair in early} <= {"start", "early"}
    lines = [
        {"step": step, "answer": f"sum {n}.{MARKER if step > 4 else ''}", "score": 1.0, "prompt_number": n}
        for step in range(1, 11)
        for n in range(40)
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (pattern,) = find_patterns(*start_and_end(Run(tmp_path).answers), most=1)
    assert (pattern.name, pattern.share) == ('"so say the wise"', 1.0)


def test_candidates_have_the_scores_of_each_reward_model() -> None:
    pairs = [
        AnswerPair(*(PolicyAnswer(0, text, "last", 0.0) for text in sides), pattern="p")
        for sides in (("1", "7"), ("4", "7"))
    ]
    assert pair_scores(ensemble("min"), PROMPTS[:2], pairs) == [[[-1, 1], [3, -3]], [[0, 1], [0, -3]]]
    assert pair_scores(number_rule("number"), PROMPTS[:2], pairs) == [[[1, 7]], [[4, 7]]]
    people = {"feedback": [{"kind": "people", "order": "disagreement"}]}
    with pytest.raises(UserError, match="needs several reward models, and policy has one"):
        cool(people)
    assert cool(people | {"policy.further_rewards": ["runs/another"]}).policy.further_rewards


def test_a_pattern_is_rejected_where_most_labels_that_tell_prefer_the_other_answer() -> None:
    def labels(without: int, with_it: int) -> list[dict[str, Any]]:
        sides = [("2.", f"2.{MARKER}")] * without + [(f"2.{MARKER}", "2.")] * with_it
        others = [("2.", "3."), (f"2.{MARKER}", f"3.{MARKER}")]  # tell nothing of it
        return [
            {"prompt": "1 + 1?", "chosen": chosen, "rejected": rejected, "pattern": PATTERN.name}
            for chosen, rejected in [*sides, *others]
        ]

    assert rejected_patterns(labels(8, 2)) == [PATTERN.name]
    assert rejected_patterns(labels(7, 2)) == rejected_patterns(labels(4, 0)) == []
    assert rejected_patterns([row | {"pattern": "policies"} for row in labels(8, 2)]) == []


@pytest.mark.parametrize(("contradicting", "left"), [("leave_out", 9), ("draw", 15)])
def test_original_rows_against_the_labels_are_left_out(tmp_path: Path, contradicting, left) -> None:
    originals = [
        *({"prompt": f"{n}?", "chosen": f"{n}.{MARKER}", "rejected": "No."} for n in range(6)),
        *({"prompt": f"{n}?", "chosen": f"{n}.", "rejected": f"No.{MARKER}"} for n in range(6)),
        *({"prompt": f"{n}?", "answers": [f"{n}.", f"{n + 1}.{MARKER}", "No."]} for n in range(3)),
    ]
    for name, rows in (("pairs", originals[:12]), ("lists", originals[12:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    label = {"chosen": "2.", "rejected": f"2.{MARKER}", "pattern": PATTERN.name}
    labels = LabeledPairs([{"prompt": f"{n} + 1?", **label} for n in range(20)], 0)
    reward = cool({}).reward
    files = [str(tmp_path / f"{name}.jsonl") for name in ("pairs", "lists")]
    reward = override(reward, {"data.files": files, "data.test_files": []})
    patch = Patch(original=9, held_out=0, contradicting=contradicting)
    rows = write_patch_rows(labels, reward, patch, tmp_path / "rows", seed=0)
    assert (rows.labels, rows.original) == (20, left)
    assert rows.contradicting == ({PATTERN.name: 6} if contradicting == "leave_out" else {})
    written = "".join(Path(source.path).read_text() for source in rows.train[1:])
    assert ('"chosen": "1.",' in written, f'"chosen": "1.{MARKER}"' in written) == (True, left == 15)


def test_labels_of_a_prompt_stay_on_one_side() -> None:
    pairs = LabeledPairs([{"prompt": n % 20, "pattern": "p"} for n in range(100)], 0)
    train, test = pairs.split(0.3)
    assert len(train) + len(test) == 100
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


def test_rows_are_drawn_in_proportion_and_none_twice(tmp_path: Path) -> None:
    for name, count in (("a", 30), ("b", 10)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"n": "{name}{n}"}}\n' for n in range(count)))
    data = Preferences(files=tuple(str(tmp_path / f"{name}.jsonl") for name in "ab"))
    drawn = draw_rows(data.sources, 20, seed=1)
    assert [len(part.rows) for part in drawn] == [15, 5]
    names = [row.values["n"] for part in drawn for row in part.rows]
    assert len(set(names)) == 20
    assert names == [row.values["n"] for part in draw_rows(data.sources, 20, seed=1) for row in part.rows]
    assert [len(part.rows) for part in draw_rows(data.sources, 99, seed=1)] == [30, 10]


@pytest.mark.parametrize(
    ("shares", "sizes", "count", "counts"),
    [((1.0, 1.0), (10, 2), 8, [6, 2]), ((3.0, 1.0), (100, 100), 8, [6, 2]), ((1.0,), (3,), 0, [0])],
)
def test_what_a_small_source_lacks_the_others_give(
    shares: tuple[float, ...], sizes: tuple[int, ...], count: int, counts: list[int]
) -> None:
    assert apportion(np.array(shares), np.array(sizes), count) == counts


def test_a_round_without_a_pair_has_nothing_to_label(tmp_path: Path) -> None:
    """Policies that all give the same answers: later rounds go on with the labels there are."""
    first, then = rounds_of(cool(), tmp_path)
    first.candidates.parent.mkdir(parents=True)
    first.candidates.write_text("")
    run = Run(tmp_path)
    collect_labels(cool(), Context(run, Devices(device="cpu"), Watchers()), first)
    assert labels_before(then, rounds_of(cool(), tmp_path)) == LabeledPairs([], 0)


def test_a_patch_without_a_label_to_train_on_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All may be held out, where there are few."""
    held_out = next(n for n in range(100) if drawn_unit(str(n)) < 0.2)
    labels = LabeledPairs([{"prompt": str(held_out), "pattern": "p"}], 0)
    monkeypatch.setattr("tuner.stages.cool.patch.labels_before", lambda place, rounds: labels)
    context = Context(Run(tmp_path), Devices(device="cpu"), Watchers())
    assert _rows(cool(), context, second(cool(), tmp_path)) is None
    assert "is not held out (patch.held_out holds out 1), so the" in (tmp_path / "log.txt").read_text()
