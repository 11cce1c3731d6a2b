"""Launching ranks: exit code and message come from the rank that failed for a reason of its own."""

import subprocess
import sys
import time

import pytest

from tuner.cli import launch as launch_module

RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
scenario = sys.argv[1]
if scenario == "one fails" and rank == 1:
    print("tuner: rank 1: the reason", file=sys.stderr); sys.exit(2)
if scenario == "all fail":
    print(f"tuner: rank {rank}: the same", file=sys.stderr); sys.exit(2)
if scenario == "one is killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if scenario == "one is killed":
    time.sleep(0.5); print("Traceback: connection reset by peer", file=sys.stderr); sys.exit(1)
if scenario == "main saves" and rank == 1:
    sys.exit(143)
if scenario == "main saves":
    time.sleep(4); open(sys.argv[2], "w").write("saved"); sys.exit(143)
if scenario == "one fails":
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Launch two ranks of a script instead of tuner; returns (exit code, stderr)."""
    (tmp_path / "rank.py").write_text(RANK)
    popen = subprocess.Popen
    script = [sys.executable, str(tmp_path / "rank.py")]
    monkeypatch.setattr(
        launch_module.subprocess, "Popen", lambda command, **options: popen(script + command[3:], **options)
    )

    def launch(*arguments):
        import signal

        handlers = {
            number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        code = launch_module.launch(arguments, 2)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return code, capfd.readouterr().err

    return launch


def test_success(run):
    assert run("fine") == (0, "")


def test_another_ranks_error_is_shown_and_the_others_are_ended(run):
    start = time.monotonic()
    assert run("one fails") == (2, "tuner: rank 1: the reason\n")
    assert time.monotonic() - start < 20


def test_an_error_on_all_ranks_is_shown_once(run):
    assert run("all fail") == (2, "tuner: rank 0: the same\n")


def test_a_rank_that_was_killed_is_named(run):
    code, said = run("one is killed")
    assert code == 137
    assert (
        "tuner: rank 1 was killed by SIGKILL, which is what the system does when memory runs out; run" in said
    )


def test_an_interrupted_rank_may_finish_saving(run, tmp_path):
    code, _ = run("main saves", str(tmp_path / "checkpoint"))
    assert code == 143
    assert (tmp_path / "checkpoint").read_text() == "saved"
