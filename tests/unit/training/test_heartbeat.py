"""A rank that is gone or hangs is named, and the others end; one that works is waited for."""

import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.equivalence.conftest import SMALL
from tests.forked import fork
from tuner.errors import LOST
from tuner.training import companion, heartbeat, signs_of_life
from tuner.training.devices import Devices
from tuner.training.loop_settings import LoopSettings
from tuner.training.optimizers import Trained
from tuner.training.signs_of_life import Sign, judge
from tuner.training.updater import Updater

WAITING = Sign("one", 11, "runs", "step 3", "tuner/training/loop.py:1 (f)", met=True, waits=True, still=20.0)
WORKING = replace(
    WAITING, host="two", pid=22, doing="step 3, scores", place="/rules.py:7 (rule)", waits=False
)


def verdict(other: Sign, waited: float = 20.0) -> tuple[str, bool] | None:
    result = judge({0: replace(WAITING, still=waited), 1: other}, waited)
    return None if result is None else (result.sentence, result.ends)


def test_a_rank_that_works_is_waited_for():
    assert verdict(replace(WORKING, still=0.0)) is None
    sentence = "waiting for rank 1 (two, process 22) for 50 s: step 3, scores, /rules.py:7 (rule); it works"
    assert verdict(replace(WORKING, still=0.0), 50.0) == (sentence, False)
    sentence, ends = verdict(replace(WORKING, still=590.0), 7000.0)
    assert "it has not moved for 590 s" in sentence
    assert not ends


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (replace(WORKING, state="ended"), "has ended, and its own output says why"),
        (
            replace(WORKING, silent=41.0),
            "has given no sign of life for 41 s: its machine or the network is gone",
        ),
        (replace(WORKING, state="stopped", still=41.0), "has been stopped for 41 s (SIGSTOP, or a debugger)"),
        (replace(WORKING, still=601.0), "hangs: it has not moved for 601 s, and the others wait for it"),
    ],
)
def test_a_rank_that_will_not_come_is_named(other, reason):
    sentence, ends = verdict(other, 700.0)
    assert ends
    where = "it was last in: step 3, scores, /rules.py:7 (rule)"
    assert sentence == f"rank 1 (two, process 22) {reason}; {where}"


def test_ranks_that_wait_for_each_other_are_told_apart():
    elsewhere = replace(WORKING, waits=True, still=45.0)
    assert verdict(elsewhere, 39.0) is None
    assert verdict(elsewhere, 45.0) == (
        "ranks have waited for each other for 45 s in different places, and none gets on: "
        "rank 0 (one, process 11): step 3, tuner/training/loop.py:1 (f); "
        "rank 1 (two, process 22): step 3, scores, /rules.py:7 (rule)",
        True,
    )
    sentence, _ = verdict(replace(WAITING, still=45.0), 45.0)
    assert "in one place, step 3, tuner/training/loop.py:1 (f): the network between them is gone" in sentence


def test_a_rank_that_has_not_started_is_numbered_and_one_without_a_heartbeat_is_left_alone():
    unmet = {0: replace(WAITING, met=False), 1: Sign()}
    assert judge(unmet, 50.0).sentence == "rank 1 has not started, and the others wait for it"
    assert judge(unmet, 601.0).ends
    assert judge({0: WAITING, 1: Sign(still=700.0)}, 700.0) is None


def main_thread_of(wait: Callable[[], None], lock: threading.Lock) -> bool:
    """Whether a thread that waits for a lock, which is held here, would count as one that waits for other ranks."""
    thread = threading.Thread(target=wait)
    with lock:
        thread.start()
        while (frame := sys._current_frames()[thread.ident]).f_code.co_name != "synchronize":
            time.sleep(0.01)
        waits = heartbeat._is_exchange(frame)
    thread.join()
    return waits


def test_a_wait_for_a_gpu_counts_where_devices_make_it(monkeypatch):
    """FSDP's exchanges are queued on the device. The stand-in for torch.cuda.synchronize stands in its file, too."""
    lock = threading.Lock()
    source = "def synchronize(device):\n    lock.acquire()\n    lock.release()\n"
    names = {"lock": lock}
    exec(compile(source, torch.cuda.__file__, "exec"), names)
    monkeypatch.setattr(torch.cuda, "synchronize", names["synchronize"])
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert main_thread_of(lambda: Devices.synchronize(on_gpu), lock)
    assert not main_thread_of(lambda: torch.cuda.synchronize(on_gpu.device), lock)


def test_an_update_waits_for_the_device_before_it_reads_from_it():
    events: list[str] = []

    class Noting(Devices):
        def synchronize(self) -> None:
            events.append("synchronize")

        def sum_gradients(self, parameters) -> None:
            events.append("sum_gradients")

    class Loss:
        def item(self) -> float:
            events.append("item")
            return 1.0

    weights = {"weight": torch.nn.Parameter(torch.ones(2, 2))}
    updater = Updater({"all": Trained(weights, 0.1)}, LoopSettings.of(SMALL), 1, Noting(device="cpu"))
    weights["weight"].grad = torch.ones(2, 2)
    updater.apply(0, {("loss", "tokens"): Loss()})
    assert events == ["synchronize", "sum_gradients", "item"]


# Real ranks


def killed(devices: Devices) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ended(devices: Devices) -> None:
    sys.exit(3)


def stopped(devices: Devices) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def machine_gone(devices: Devices) -> None:
    os.write(1, f"companion {heartbeat._heart._companion}\n".encode())
    os.kill(heartbeat._heart._companion, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)


def sleeping(devices: Devices) -> None:
    time.sleep(600)


def elsewhere(devices: Devices) -> None:
    torch.distributed.barrier(group=devices.other_group)


def holding_the_interpreter(devices: Devices) -> None:
    ctypes.PyDLL(None).usleep(7_000_000)


SAID = {
    killed: (1, r"rank 1 \(.*\) has ended, and its own output says why; it was last in: step 7"),
    ended: (1, r"rank 1 \(.*\) has ended"),
    stopped: (
        1,
        r"rank 1 \(.*\) has been stopped for .* \(SIGSTOP, or a debugger\); it was last in: step 7, \S+:",
    ),
    machine_gone: (1, r"rank 1 \(.*\) has given no sign of life"),
    sleeping: (1, r"rank 1 \(.*\) hangs: .*; it was last in: step 7, .*test_heartbeat.py:\d+ \(sleeping\)"),
    elsewhere: (1, r"ranks have waited .* and none gets on: .*test_heartbeat.py:\d+ \(elsewhere\)"),
    holding_the_interpreter: (1, r"waiting for rank 1 \(.*\) for .*: step 7, "),
    "the keeper": (
        0,
        r"rank 0 at 127.0.0.1:\d+, where the ranks meet, has not answered .*; rank 0 was last in: step 7",
    ),
}
"""What befalls a rank -> the rank, and what is said of it."""


def rank(what: Callable[[Devices], None], number: int, unlucky: int, port: int, file: Path) -> None:
    """One of two processes."""
    for descriptor in (1, 2):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= place | {"RANK": str(number), "LOCAL_RANK": str(number)}
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        devices = Devices(device="cpu")
        devices.other_group = torch.distributed.new_group([0, 1])
        heartbeat.now_doing("step 7")
        devices.wait()
        time.sleep(1)  # so that the others hear of it
        if number == unlucky:
            what(devices)
        devices.wait()
    except RuntimeError:
        heartbeat.await_verdict()
    finally:
        heartbeat._heart.stop()  # fork() leaves out what ends a process in order


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_real_ranks(tmp_path, monkeypatch):
    """All at once, as they mostly sleep; with seconds in place of minutes."""
    for module in (companion, heartbeat, signs_of_life):
        for name, seconds in {"BEAT": 0.2, "SILENT": 4.0, "IDLE": 9.0, "NOTICE": 2.0, "ENDED": 1.0}.items():
            monkeypatch.setattr(module, f"{name}_SECONDS", seconds, raising=False)
    monkeypatch.setattr(companion, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(companion, "OBEY_SECONDS", 2.0)
    monkeypatch.setattr(companion, "LEAST_LOAD", 0.5)  # of processes that do nothing else
    children: dict[str, list[int]] = {}
    for what, (unlucky, _) in SAID.items():
        name, port = getattr(what, "__name__", what), free_port()
        befalls = stopped if what == "the keeper" else what
        children[name] = [
            fork(lambda n=n, w=befalls, u=unlucky, p=port, f=tmp_path / name: rank(w, n, u, p, f))
            for n in range(2)
        ]
    for what, (unlucky, sentence) in SAID.items():
        name = getattr(what, "__name__", what)
        patient, other = children[name][1 - unlucky], children[name][unlucky]
        code = exit_within(60.0, patient)
        other_code = exit_within(1.0 if what is machine_gone else 60.0, other)
        said = (tmp_path / name).read_text()
        assert re.search(f"tuner: {sentence}", said), f"{name}: {said}"
        survives = what is holding_the_interpreter
        assert ("run the same command again" in said) != survives
        assert code == (0 if survives else LOST), name
        if what is machine_gone:
            assert other_code is None
            os.kill(int(re.search(r"companion (\d+)", said)[1]), signal.SIGKILL)
        else:
            expected = {holding_the_interpreter: 0, ended: 1, sleeping: LOST, elsewhere: LOST}
            assert other_code == expected.get(what, -signal.SIGKILL), name


def exit_within(seconds: float, child: int) -> int | None:
    """What a child exited with; None: it has not, and is killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
