"""A run's folder: JSON that everyone reads, and the functions its config names."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence.conftest import SMALL
from tuner.config import load_config, override
from tuner.errors import UserError
from tuner.evaluation.held_out_policy import PolicyMeasurement
from tuner.evaluation.position_loss import RangeLoss
from tuner.stages.run import Run
from tuner.training.code_fingerprint import code_fingerprints, functions_of
from tuner.training.json_lines import finite
from tuner.training.resume_rules import changes_that_bind, extension, reach_sentences
from tuner.training.watchers import Sample

FILE = '''"""A config with its own function."""

from tests.equivalence.conftest import SMALL
from tuner.config import override


def exact(answer, row):
    return float(answer == row["messages"][-1]["content"])


config = override(SMALL, {
    "name": "own",
    "data.split": {"test": 0.1},
    "evaluation.score": f"{__file__}:exact",
    "tokens_per_pass": 512,
})
'''
CHANGES: dict[str, Callable[[str], str]] = {
    "a comment": lambda text: text.replace("\n\nconfig", "\n\n# what is trained\nconfig"),
    "a comment in the function": lambda text: text.replace("    return", "    # to the letter\n    return"),
    "the layout": lambda text: text.replace("(answer, row)", "(\n    answer,\n    row,\n)"),
    "a field that is free on resume": lambda text: text.replace("512", "256"),
    "the config's annotation": lambda text: text.replace("\nconfig =", "\nconfig: object ="),
}


def begun(folder: Path, file: Path) -> Run:
    """A run in which a step was taken."""
    run = Run(folder)
    run.start(load_config(file), (), {})
    run.record({"step": 1, "loss": 1.0})
    run.release()
    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_functions_that_do_the_same(tmp_path, file, change):
    run = begun(tmp_path / "own", file)
    before = run.read_json("functions")
    file.write_text(CHANGES[change](FILE))
    assert file.read_text() != FILE
    run.start(load_config(file), (), {})
    run.release()
    assert run.read_json("functions") == before
    (copy,) = before["copies"].values()
    assert (run.folder / copy).read_text() == file.read_text()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float(answer == ", "1 - float(answer == "),
        ("[-1]", "[-2]"),
        ("\n\nconfig", "\n\nexact = abs\nconfig"),
        ("\n\nconfig", "\n\nif exact:\n    exact = abs\n\nconfig"),
    ],
)
def test_a_run_does_not_go_on_with_functions_that_do_something_else(tmp_path, file, old, new):
    run = begun(tmp_path / "own", file)
    file.write_text(FILE.replace(old, new))
    with pytest.raises(UserError, match="the functions changed since this run began"):
        run.start(load_config(file), (), {})
    run.release()


def test_prose_about_a_file_names_no_function():
    """Else the run would be bound to that file, and merging would refuse to read its rows."""
    config = override(SMALL, {"data.system": f"You explain {__file__}: be brief."})
    assert functions_of(config) == []
    assert code_fingerprints(config) == {}
    score = f"{__file__}:begun"
    named = override(config, {"data.split.test": 0.1, "evaluation.score": score})
    assert functions_of(named) == [score]


def test_a_field_that_is_not_free_is_refused_as_the_configs(tmp_path, file):
    run = begun(tmp_path / "own", file)
    file.write_text(FILE.replace('"tokens_per_pass": 512', '"optimizer.lr": 0.1'))
    with pytest.raises(UserError, match=r"optimizer\.lr was 0\.005 and is now 0\.1"):
        run.start(load_config(file), (), {})
    run.release()


def test_a_run_that_its_epochs_end_before_max_steps_is_said():
    assert reach_sentences(40, 40, 1.0) == reach_sentences(None, 40, 1.0) == []
    (sentence,) = reach_sentences(100, 40, 1.5)
    assert sentence.startswith("max_steps=100 is not reached: the rows give 40 steps in 1.5 epochs")


@pytest.mark.parametrize(
    ("old", "new", "longer"),
    [
        ({"max_steps": 5}, {"max_steps": 6}, ["max_steps"]),
        ({"max_steps": 5}, {"max_steps": None}, ["max_steps"]),
        ({"max_steps": None}, {"max_steps": 5}, []),
        ({"max_steps": 5, "epochs": 1.0}, {"max_steps": 6, "epochs": 0.5}, []),
        ({"max_steps": 5, "epochs": 1.0}, {"max_steps": 5, "epochs": 2.0}, ["epochs"]),
        ({"max_steps": 5}, {"max_steps": 5}, []),
    ],
)
def test_only_larger_limits_make_a_run_longer(old, new, longer):
    before, after = override(SMALL, old), override(SMALL, new)
    assert [path for path, *_ in extension(before, after)] == longer
    assert bool(changes_that_bind(before, after)) is (not longer and old != new)


STEPS = {"rounds.0.steps": 3}, {"rounds.1.steps": 3}


@pytest.mark.parametrize("is_finished", [False, True])
def test_rounds_that_have_begun_bind_and_later_ones_are_planned_anew(tmp_path, is_finished):
    config = override(load_config("quickstart_cool"), {"max_steps": 5})
    run = Run(tmp_path / "rounds")
    run.start(config, (), {})
    run.release()
    first_policy, second_reward = Run(run.folder / "round_1/ppo"), Run(run.folder / "round_2/reward")
    first_policy.start(config.policy, (), {})
    run.refuse_changes(override(config, STEPS[0]))  # no step was taken
    first_policy.record({"step": 1})
    if is_finished:
        run.record({"step": 1})
    first, second, third = (override(config, {"rounds": list(config.rounds[:1]) * n}) for n in (1, 2, 3))
    for changed in (override(config, STEPS[1]), first, second, third):
        run.refuse_changes(changed)
    steps = config.rounds[0].steps
    with pytest.raises(UserError, match=rf"config: rounds\.0\.steps was {steps} and is now 3; put it back"):
        run.refuse_changes(override(config, STEPS[0]))
    second_reward.start(config.reward, (), {})
    second_reward.record({"step": 1})
    run.refuse_changes(override(config, {"rounds.1.patch.on_loss": "roll_back"}))
    for changed, path in ((override(config, STEPS[1]), "rounds.1.steps"), (first, "rounds.1")):
        with pytest.raises(UserError, match=rf"config: {re.escape(path)} was "):
            run.refuse_changes(changed)


def test_only_further_rounds_make_a_run_longer():
    config = load_config("quickstart_cool")
    longer = override(config, {"rounds": [*config.rounds, config.rounds[0]]})
    assert [path for path, *_ in extension(config, longer)] == ["rounds.2"]
    assert extension(longer, config) == extension(config, override(config, STEPS[0])) == []
    assert [path for path, *_ in changes_that_bind(longer, config, 3)] == ["rounds.2"]


def test_numbers_that_json_has_no_word_for_become_none_at_any_depth():
    value = {"a": [1.0, math.nan, {"b": (math.inf, "nan", [-math.inf])}], "c": 2, "d": None, "e": True}
    assert finite(value) == {"a": [1.0, None, {"b": [None, "nan", [None]]}], "c": 2, "d": None, "e": True}
    assert finite(math.nan) is None


@pytest.mark.parametrize(
    "write", [lambda run, value: run.save_json("results", value), Run.finish], ids=["save_json", "finish"]
)
def test_what_a_run_keeps_is_valid_json(tmp_path, write):
    run = Run(tmp_path / "run")
    run.start(override(SMALL, {}), (), {})
    run.record({"step": 1, "loss": 1.0})
    write(run, {"score": math.nan, "rows": [{"loss": math.inf}]})
    run.release()
    assert json.loads((run.folder / "results.json").read_text(), parse_constant=refused) == {
        "score": None,
        "rows": [{"loss": None}],
    }


def test_what_a_run_appends_is_valid_json(tmp_path):
    run = Run(tmp_path)
    run.record({"step": 1, "loss": math.nan})
    run.record_samples(1, [Sample("Q", "A", "B", math.nan)])
    run.record_answers(1, [{"answer": "A", "score": math.inf}])
    for name, field in (("metrics", "loss"), ("samples", "score"), ("rollouts", "score")):
        assert json.loads((tmp_path / f"{name}.jsonl").read_text(), parse_constant=refused)[field] is None


def refused(name: str) -> Any:
    raise ValueError(name)


def test_a_measure_that_is_no_number_is_none_in_its_file_and_no_number_again_behind_it(tmp_path):
    run = Run(tmp_path)
    measure = PolicyMeasurement(
        {"gold": 0.5, "score": math.nan, "score/polite": math.nan},
        [RangeLoss(0, 256, math.nan, 3.0), RangeLoss(256, 512, 1.5, 2.0)],
    )
    run.save_json("before", measure.to_dict())
    again = PolicyMeasurement.from_dict(run.read_json("before"))
    assert again.means["gold"] == 0.5
    assert math.isnan(again.means["score"])
    assert math.isnan(again.means["score/polite"])
    assert math.isnan(again.ranges[0].loss)
    assert (again.ranges[0].start, again.ranges[0].end, again.ranges[0].weight) == (0, 256, 3.0)
    assert again.ranges[1] == measure.ranges[1]
    assert str(again) == str(measure) == "gold 0.5000, score nan, replay loss nan"
