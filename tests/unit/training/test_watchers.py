"""Watchers look on: one that fails is dropped with a word, and training goes on."""

from pathlib import Path
from typing import Any

import pytest

from tuner.config import SFT, Chat, Model
from tuner.errors import UserError
from tuner.training.watchers import Watchers

CONFIG = SFT(name="r", model=Model(path="tuner:tiny"), data=Chat(files=("rows.jsonl",)))


class Recorder:
    """Remembers what it was told, and fails where asked to."""

    def __init__(self, fails_in: str = "", error: Exception | None = None) -> None:
        self.told: list[tuple[str, Any]] = []
        self._fails_in, self._error = fails_in, error or RuntimeError("no network")

    def _hear(self, verb: str, what: Any) -> None:
        self.told.append((verb, what))
        if verb == self._fails_in:
            raise self._error

    def begin(self, run_folder: Path, config: Any, first_step: int, total_steps: int) -> None:
        self._hear("begin", (first_step, total_steps))

    def step(self, record: Any) -> None:
        self._hear("step", record["step"])

    def samples(self, step: int, samples: Any) -> None:
        self._hear("samples", step)

    def message(self, text: str) -> None:
        self._hear("message", text)

    def end(self, outcome: str) -> None:
        self._hear("end", outcome)

    @property
    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.told]


def _whole_run(watchers: Watchers) -> None:
    watchers.begin(Path("runs/r"), CONFIG, 0, 2)
    watchers.step({"step": 1})
    watchers.samples(1, [])
    watchers.step({"step": 2})
    watchers.message("a fact")
    watchers.end("finished")


def test_everything_is_told_in_order() -> None:
    first, second = Recorder(), Recorder()
    _whole_run(Watchers([first, second]))
    assert first.told == second.told
    assert first.verbs == ["begin", "step", "samples", "step", "message", "end"]


@pytest.mark.parametrize("verb", ["begin", "step", "samples", "message", "end"])
def test_a_failing_watcher_is_reported_once_and_dropped(verb: str) -> None:
    good, bad = Recorder(), Recorder(verb)
    _whole_run(Watchers([good, bad]))
    reports = [text for verb, text in good.told if verb == "message" and text != "a fact"]
    assert reports == [
        f"Recorder failed in {verb} (RuntimeError: no network) and is dropped; training goes on"
    ]
    assert bad.verbs[-1] == verb, "it hears nothing more"
    assert good.told[-1] == ("end", "finished")


def test_the_last_failing_watcher_is_still_heard_of(capsys: pytest.CaptureFixture[str]) -> None:
    _whole_run(Watchers([Recorder("step")]))
    assert capsys.readouterr().err.count("Recorder failed in step") == 1


def test_a_watcher_that_cannot_report_a_failure_is_dropped_too(capsys: pytest.CaptureFixture[str]) -> None:
    watchers = Watchers([Recorder("step"), Recorder("message")])
    _whole_run(watchers)
    assert capsys.readouterr().err.count("training goes on") == 1


def test_the_users_mistake_stops_the_run_before_it_begins_and_ends_who_had_begun() -> None:
    first, second, third = Recorder(), Recorder("begin", UserError("no key")), Recorder()
    watchers = Watchers([first, second, third])
    with pytest.raises(UserError, match="no key"):
        watchers.begin(Path("runs/r"), CONFIG, 0, 2)
    watchers.end("failed")
    assert first.told[-1] == ("end", "failed")
    assert first.verbs.count("end") == 1
    assert third.told == []


def test_interrupts_are_not_failures() -> None:
    class Interrupting(Recorder):
        def step(self, record: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _whole_run(Watchers([Interrupting()]))


def test_nobody_looking_on_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    _whole_run(Watchers())
    assert capsys.readouterr() == ("", "")
