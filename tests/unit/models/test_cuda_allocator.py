"""The allocator's setting: ours where the user has none, never another program's."""

import os

import pytest

from tuner.models import cuda_allocator
from tuner.models.cuda_allocator import FORMER, GROWING, VARIABLE, let_segments_grow
from tuner.models.tool_python import tool_environment


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.setattr(cuda_allocator, "_is_ours", False)
    for name in (VARIABLE, FORMER):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_it_is_set_here_and_in_no_other_program(monkeypatch):
    let_segments_grow()
    assert os.environ[VARIABLE] == GROWING
    assert VARIABLE not in tool_environment()
    monkeypatch.setenv(VARIABLE, "max_split_size_mb:64")
    assert tool_environment()[VARIABLE] == "max_split_size_mb:64"


@pytest.mark.parametrize("name", [VARIABLE, FORMER])
@pytest.mark.parametrize("value", ["max_split_size_mb:64", GROWING])
def test_a_users_own_is_kept_and_handed_on(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    let_segments_grow()
    assert {key: os.environ.get(key) for key in (VARIABLE, FORMER)} == {
        VARIABLE: None,
        FORMER: None,
        name: value,
    }
    assert tool_environment()[name] == value


def test_a_run_on_a_cpu_sets_nothing():
    from tuner.training.devices import Devices

    Devices(device="cpu")
    assert VARIABLE not in os.environ
