"""The measures that `tuner train` prints at its end: lines, or a table where there is a terminal."""

from __future__ import annotations

import re
import sys

import pytest

from tuner.display.table import print_measures

ROUNDS = {
    "round 1": {"gold after": 0.125, "score after": 3.5, '"so say the wise"': 0.84},
    "round 2": {"gold after": 0.6, "score after": None, '"so say the wise"': 0.05},
    "round 3": {"gold after": None},
}


def test_without_a_terminal_every_round_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_measures(ROUNDS)
    assert capsys.readouterr().out.splitlines() == [
        'round 1: gold after 0.1250  score after 3.5000  "so say the wise" 0.8400',
        'round 2: gold after 0.6000  "so say the wise" 0.0500',
    ]


def test_on_a_terminal_measures_stand_below_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    print_measures({**ROUNDS, "[bold]round 4": {"[red]\x1b[31m": 1.0}})
    printed = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert printed == [
        ["gold after", "score after", '"so say the wise"', "[red]\\x1b[31m"],
        ["round 1", "0.1250", "3.5000", "0.8400", "–"],
        ["round 2", "0.6000", "–", "0.0500", "–"],
        ["[bold]round 4", "–", "–", "–", "1.0000"],
    ]
