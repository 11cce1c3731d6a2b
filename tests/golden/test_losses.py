"""Losses of short runs are those that were recorded: a change of numbers is meant, or it is a fault.

To the last digits (1e-6) on the processor and versions of the recording, to 2e-3 elsewhere; never skipped.
"""

import math

import pytest

from tests.golden import runs
from tuner.config import override

measured = {}


@pytest.fixture(scope="module")
def golden():
    assert runs.FILE.is_file(), f"{runs.FILE} is missing; {runs.RECORD_AGAIN}"
    return runs.read()


@pytest.fixture(scope="module")
def tolerance(golden):
    return runs.SAME if golden["place"] == runs.place() else runs.ELSEWHERE


def check(values, expected, tolerance):
    for name in runs.KEPT:
        assert values[name] == pytest.approx(expected[name], rel=tolerance), (
            f"{name}; if meant, {runs.RECORD_AGAIN}"
        )


def test_the_inputs_are_those_of_the_recording(golden):
    for name, found in runs.inputs().items():
        if found != golden["inputs"][name]:
            pytest.fail(
                f"the goldens belong to {name} {golden['inputs'][name][:12]}, and here is {found[:12]}; "
                f"if the change is meant, {runs.RECORD_AGAIN}"
            )


@pytest.mark.parametrize("name", runs.CONFIGS)
def test_losses_are_the_recorded_ones(name, golden, tolerance):
    measured[name] = runs.measure(runs.CONFIGS[name])
    check(measured[name], golden["runs"][name], tolerance)


def test_they_ran_and_learned(golden):
    """Not vacuous: every recorded run was compared above, over all its steps, and its loss fell."""
    assert set(golden["runs"]) == set(runs.CONFIGS)
    for name in set(runs.CONFIGS) - set(measured):  # when this test is run alone
        measured[name] = runs.measure(runs.CONFIGS[name])
    for name, expected in golden["runs"].items():
        assert {key: len(values) for key, values in expected.items()} == dict.fromkeys(runs.KEPT, runs.STEPS)
        assert len(measured[name]["loss"]) == runs.STEPS
        assert all(map(math.isfinite, expected["loss"]))
        assert expected["loss"][-1] < expected["loss"][0] - 0.2


def test_a_slightly_different_run_is_told_apart(golden, tolerance):
    """A learning rate off by a hundredth shows from the second step on."""
    config = override(runs.QLORA, {"optimizer.lr": runs.QLORA.optimizer.lr * 1.01})
    values = {**runs.measure(config), "lr": golden["runs"]["qlora"]["lr"]}
    with pytest.raises(AssertionError):
        check(values, golden["runs"]["qlora"], tolerance)
