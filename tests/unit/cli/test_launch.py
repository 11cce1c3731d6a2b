"""Ranks: exit codes and sentences come from the rank that failed for a reason of its own."""

import subprocess
import sys
import time

import pytest

from tuner.cli import launch as module

RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
kind = sys.argv[1]
if kind == "one fails" and rank == 1:
    print("tuner: rank 1: the reason", file=sys.stderr); sys.exit(2)
if kind == "all fail":
    print(f"tuner: rank {rank}: the same", file=sys.stderr); sys.exit(2)
if kind == "main saves" and rank == 1:
    sys.exit(143)
if kind == "main saves":
    time.sleep(4); open(sys.argv[2], "w").write("saved"); sys.exit(143)
if kind == "one fails":
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Launch two ranks of a script instead of tuner; returns (exit code, what was said)."""
    (tmp_path / "rank.py").write_text(RANK)
    popen = subprocess.Popen
    script = [sys.executable, str(tmp_path / "rank.py")]
    monkeypatch.setattr(
        module.subprocess, "Popen", lambda command, **options: popen(script + command[3:], **options)
    )

    def launched(*arguments):
        import signal

        handlers = {
            number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        code = module.launch(arguments, 2)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return code, capfd.readouterr().err

    return launched


def test_all_well(run):
    assert run("fine") == (0, "")


def test_a_reason_on_another_rank_is_said_and_the_others_are_ended(run):
    start = time.monotonic()
    assert run("one fails") == (2, "tuner: rank 1: the reason\n")
    assert time.monotonic() - start < 20


def test_what_all_say_is_said_once(run):
    assert run("all fail") == (2, "tuner: rank 0: the same\n")


def test_an_interrupted_rank_that_saves_is_waited_for(run, tmp_path):
    code, _ = run("main saves", str(tmp_path / "checkpoint"))
    assert code == 143
    assert (tmp_path / "checkpoint").read_text() == "saved"
