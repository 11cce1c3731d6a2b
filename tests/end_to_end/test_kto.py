"""The KTO stage as a user meets it: rows with a label or of pairs, measures by hand, resuming to the last bit."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import tuner
from tests.end_to_end.test_dpo import Killed, die, hashed, kill_at
from tests.shallow_models import shallow
from tuner.config import KTO, AdamW, Checkpoint, LoRA, Model, Preferences, Validation, override
from tuner.data.inspection import errors
from tuner.data.load_labels import load_labels
from tuner.errors import UserError
from tuner.models.load import load_tokenizer
from tuner.resources import row_examples_folder
from tuner.stages.data_view import load_data_view
from tuner.stages.kto.plan import in_order, plan_answers
from tuner.stages.run import Run

BASE = KTO(
    name="labels",
    model=Model(path=shallow(1)),
    adapter=LoRA(r=4),
    data=Preferences(
        files=("labeled.jsonl",),
        test_files=("held_out.jsonl",),
        validation_files=("held_out.jsonl",),
        template="internlm2",
        max_length=96,
    ),
    optimizer=AdamW(lr=5e-3),
    answers_per_step=4,
    answers_per_pass=2,
    max_steps=3,
    precision="fp32",
    gradient_checkpointing=False,
    device="cpu",
    evaluation=Validation(every=2, rows=4),
    checkpoint=Checkpoint(every=1, keep=2),
)
TOKENIZER: Any = load_tokenizer(BASE.model)


def labeled(number: int, label: Any, **more: Any) -> dict[str, Any]:
    answer = f"It is {number + 2}, with pleasure." if label else f"{number + 2}."
    return {"prompt": f"What is {number} + 2?", "completion": answer, "label": label, **more}


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("kto"))
        write("labeled.jsonl", [labeled(number, number % 2 == 0) for number in range(9)])
        write("held_out.jsonl", [labeled(number, number < 12) for number in range(10, 15)])
        yield


# Rows


def read(rows: list[dict[str, Any]], **settings: Any) -> Any:
    write("rows.jsonl", rows)
    return load_labels(Preferences(files=("rows.jsonl",), template="internlm2", **settings), TOKENIZER)


def text(labels: Any, index: int) -> str:
    return TOKENIZER.decode(labels.sequences.example(index)[0])


def test_labels_pairs_and_lists_become_labeled_answers() -> None:
    messages = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "Two."}]
    one = read([labeled(1, True), labeled(1, False), {**labeled(5, 0), "weight": 0}])
    assert one.train.desirable.tolist() == [True, False]
    assert "1 answers to train on are desirable, 1 are not" in str(one.report)
    assert read([{"messages": messages, "label": 1}]).train.desirable.tolist() == [True]
    pairs = read([{"prompt": "a", "chosen": "good", "rejected": "bad", "condition": "c", "margin": 1.0}])
    assert [("good" in text(pairs.train, i), bool(pairs.train.desirable[i])) for i in (0, 1)] == [
        (True, True),
        (False, False),
    ]
    assert "1 rows have a condition, which a policy is not given" in str(pairs.report)
    ranked = read([{"prompt": "a", "answers": ["x", "y", "z"], "scores": [1.0, 3.0, 2.0]}]).train
    assert ranked.desirable.tolist() == [True, False, False]
    assert "y" in text(ranked, 0)
    example = Preferences(files=(str(row_examples_folder() / "labeled.jsonl"),), template="internlm2")
    assert load_labels(example, TOKENIZER).train.desirable.tolist() == [True, False, True, False]
    both = read([labeled(1, True), {**labeled(1, True), "label": False}])
    assert "1 answers are desirable in one row and undesirable in another" in str(both.report)
    assert both.train.fingerprint() != both.train.take([1, 0]).fingerprint()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (labeled(1, "yes"), 'rows.jsonl:1: "label" is true for a desirable answer'),
        ({"messages": [{"role": "user", "content": "2?"}], "label": True}, "does not end with an answer"),
        ({**labeled(1, True), "prompt": " "}, "the prompt is empty"),
        ({**labeled(1, True), "weight": 2.0}, "TRL weighs every row alike"),
        ({"prompt": "a", "completion": "b"}, "this row's shape is unknown"),
    ],
)
def test_bad_rows_are_refused_by_their_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read([row])
    assert message in str(error.value)
    assert "rows.jsonl:1" in str(error.value)


def test_the_rows_are_shown_as_they_are_trained() -> None:
    view = load_data_view(BASE, passes=2)
    preview, order = view.preview, in_order(BASE, view.rows.train)
    assert [list(group) for group in preview.groups] == [[0, 1], [2, 3]]
    assert [preview.label(index) for index in range(9)] == [
        "desirable" if label else "undesirable" for label in order.desirable
    ]
    tokens, weights = preview.examples.example(0)
    answer = view.tokenizer.decode(tokens[weights > 0])
    assert answer.endswith("<|im_end|>")
    assert ("pleasure" in answer) == order.desirable[0]
    assert preview.examples.origin(0) == order.origin(0)
    assert errors(preview.examples, view.tokenizer, view.rows.report) == []


# Training


def curve(run: Run) -> list[dict[str, Any]]:
    spent = ("seconds", "tokens_per_second", "memory_gib")
    return [{name: value for name, value in record.items() if name not in spent} for record in run.metrics]


def test_a_run_by_hand(tmp_path: Path) -> None:
    """Before the first step every reward and KL is 0, and the loss 1 − σ(0) times the weights; then margins grow."""
    weights = {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    run = tuner.train(override(BASE, {**weights, "max_steps": 9, "epochs": 3.0}), runs=tmp_path)
    assert run.results is not None
    before, after = run.results["before"], run.results["after"]
    desirable, rows = 2, 4  # of the held-out rows that are measured
    mean_weight = (2.0 * desirable + 0.5 * (rows - desirable)) / rows
    assert before["loss"] == pytest.approx(mean_weight / 2, abs=1e-5)
    for name in ("kl", "desirable_reward", "undesirable_reward", "margin"):
        assert before[name] == pytest.approx(0, abs=1e-5)
    assert after["margin"] == pytest.approx(after["desirable_reward"] - after["undesirable_reward"])
    assert after["margin"] > 0.1
    for record in run.metrics:
        if {"desirable_reward", "undesirable_reward"} <= record.keys():
            assert math.isfinite(record["desirable_reward"])
    assert not (run.model_folder / "ref").exists()
    assert plan_answers(BASE, 9).steps == 3


KINDS = {
    "lora": {},
    "full, precomputed": {"adapter": None, "optimizer.lr": 1e-4, "precompute_reference": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(BASE, {"max_steps": 5, "epochs": 2.0, "checkpoint.every": 2, **KINDS[kind]})
    whole = tuner.train(config, runs=tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 4, die)
        with pytest.raises(Killed):
            tuner.train(config, runs=tmp_path / "killed")
    again = tuner.train(config, runs=tmp_path / "killed")
    assert "going on after step 2" in (again.folder / "log.txt").read_text()
    assert curve(again) == curve(whole)
    assert hashed(again.model_folder) == hashed(whole.model_folder)
    assert again.results == whole.results


SEEN = {
    "beta": {"beta": 0.5},
    "loss": {"loss": "apo_zero_unpaired"},
    "desirable_weight": {"desirable_weight": 2.0},
    "undesirable_weight": {"undesirable_weight": 2.0},
    "answers_per_step": {"answers_per_step": 6},
    "answers_per_pass": {"answers_per_pass": 4},
    "seed": {"seed": 1},
}


def test_a_change_is_seen_and_a_reference_computed_beforehand_is_the_same(tmp_path: Path) -> None:
    quick = {"max_steps": 2, "evaluation.every": None, "data.validation_files": [], "data.test_files": []}
    base = override(BASE, {**quick, "schedule.warmup": 0.0})
    plain = tuner.train(base, runs=tmp_path / "plain")
    for name, change in SEEN.items():
        assert curve(tuner.train(override(base, change), runs=tmp_path / name)) != curve(plain), name
    before = tuner.train(override(base, {"precompute_reference": True}), runs=tmp_path / "before")
    for own, other in zip(curve(before), curve(plain), strict=True):
        for name in ("loss", "kl", "grad_norm"):
            assert own[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers_per_pass": 1}, "answers_per_pass"),
        ({"answers_per_pass": 3}, "not a multiple of answers_per_pass"),
        ({"adapter.dropout": 0.1}, "adapter.dropout: TRL's KTO does not support it"),
        ({"evaluation.keep_best": True}, "evaluation.patience or keep_best: TRL's KTO does not support it"),
        ({"data.ties": "half"}, 'data.ties="half": TRL\'s KTO does not support it'),
    ],
)
def test_what_trl_cannot_do_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValidationError), match=message):
        override(BASE, change)


def test_order_is_a_function_of_the_seed() -> None:
    labels = load_labels(BASE.data, TOKENIZER).train
    one, again, other = (in_order(override(BASE, {"seed": seed}), labels) for seed in (0, 0, 1))
    assert np.array_equal(one.starts, again.starts)
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()
