"""The heartbeat of a run in several processes: a rank that is gone or hangs is named, and the run ends.

Every rank has a companion, a small process that tells the others of it through the store in which the ranks have met
(torch's TCPStore): `companion.py`. Here is the rank's side: a thread that tells the companion where the main thread
is, and ends the rank where the companion says so. A signal or an exception would not do: a main thread that waits for
another rank sits in gloo or NCCL, and hears neither.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.distributed_c10d import _world

from tuner.errors import LOST
from tuner.training.companion import BEAT_SECONDS, Companion, Meeting

VERDICT_SECONDS = 60.0
"""How long a rank whose exchange has failed waits to hear which rank is the reason."""
_PACKAGE = Path(__file__).parent.parent
_OWN_FILES = (str(Path(__file__)), str(Path(__file__).with_name("devices.py")))
"""Where a main thread only waits: what it waits in is told by the caller."""
_WAITS_FOR_GPU = f"{os.sep}torch{os.sep}cuda{os.sep}"
_LIBRARIES = (os.path.dirname(os.__file__), "site-packages", "dist-packages", "<frozen")


class Heartbeat:
    """This process's companion, and the thread that talks to it."""

    def __init__(self, meeting: Meeting) -> None:
        """Start both. Call it before the ranks meet: what is open or running then, the companion would inherit."""
        self.doing = "start-up"
        self.log: Callable[[str], None] = lambda text: None
        self._watched = threading.get_ident()
        self._moves, self._last_move = 0, None
        reads_notes, self._notes = os.pipe()
        self._orders, writes_orders = os.pipe()
        with warnings.catch_warnings():  # of other threads, which are not in the child: it needs none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            self._companion = os.fork()
        if not self._companion:
            Companion(meeting, notes=reads_notes, orders=writes_orders).live()
        os.close(reads_notes), os.close(writes_orders)
        os.set_blocking(self._notes, False)
        self._writing, self._stopped = threading.Lock(), False
        threading.Thread(target=self._talk, name="heartbeat", daemon=True).start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Tell the others that this process ends."""
        with self._writing:
            self._stopped = True
            os.close(self._notes)
        # it tells them and ends, after at most as long as a store takes to answer
        with suppress(OSError):
            os.waitpid(self._companion, 0)

    def _talk(self) -> None:
        """Tell the companion where the main thread is, and obey its orders, until either ends."""
        pending = b""
        while True:
            try:
                with self._writing:
                    if self._stopped:
                        return
                    os.write(self._notes, self._note())
                if not select.select([self._orders], [], [], BEAT_SECONDS)[0]:
                    continue
                received = os.read(self._orders, 65536)
            except BlockingIOError:  # the companion does not read just now
                time.sleep(BEAT_SECONDS)
                continue
            except OSError:  # the companion has ended
                return
            if not received:
                return
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                self._obey(json.loads(line))

    def _obey(self, order: dict[str, str]) -> None:
        for text in order.values():
            with suppress(Exception):  # a full disk must not keep a rank that is to end
                self.log(text)
        if "end" in order:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(LOST)

    def _note(self) -> bytes:
        frame = sys._current_frames().get(self._watched)
        move = frame and (frame.f_code, frame.f_lasti, _exchanges())
        if move != self._last_move:
            self._moves, self._last_move = self._moves + 1, move
        note = {
            # a pipe takes lines of up to 4,096 bytes whole; a character has up to six in JSON
            "doing": self.doing[:200],
            "place": _place(frame)[-300:] if frame else "",
            "met": torch.distributed.is_initialized(),
            "waits": frame is not None and (_is_exchange(frame) or _is_in_backward_exchange()),
            "moves": self._moves,
        }
        return json.dumps(note).encode() + b"\n"


_heart: Heartbeat | None = None


def start(rank: int, world: int, *, spins: bool) -> None:
    """Start this process's heartbeat, unless it has one, or there is nobody to hear it.

    spins: whether waiting for others takes processor time, as it does with a GPU.
    """
    global _heart
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    # /proc tells a companion of its rank
    if _heart is None and world > 1 and address and port and sys.platform == "linux":
        _heart = Heartbeat(Meeting(address, int(port), rank, world, spins=spins))


def now_doing(part: str) -> None:
    """Tell the other ranks which part of the run this one is in."""
    if _heart is not None:
        _heart.doing = part


def log_with(log: Callable[[str], None]) -> None:
    """Write what the heartbeat says of other ranks to a log, too."""
    if _heart is not None:
        _heart.log = log


def await_verdict() -> None:
    """After an exchange that failed, wait to hear which rank is the reason; this process then ends."""
    if _heart is not None:
        _heart.doing = f"{_heart.doing}, in an exchange that failed"
        time.sleep(VERDICT_SECONDS)


def _place(frame: FrameType) -> str:
    """The innermost line of tuner's or the user's code, below what merely waits."""
    outer: FrameType | None = frame
    while outer is not None:
        file = outer.f_code.co_filename
        if file.startswith(str(_PACKAGE)) and file not in _OWN_FILES:
            return f"tuner/{os.path.relpath(file, _PACKAGE)}:{outer.f_lineno} ({outer.f_code.co_name})"
        if file not in _OWN_FILES and not any(library in file for library in _LIBRARIES):
            return f"{file}:{outer.f_lineno} ({outer.f_code.co_name})"
        outer = outer.f_back
    return ""


def _is_exchange(frame: FrameType) -> bool:
    # a wait for the GPU counts as its caller does: in devices.py for exchanges queued there, as FSDP's gathers are
    while _WAITS_FOR_GPU in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    file = frame.f_code.co_filename
    return f"{os.sep}torch{os.sep}distributed{os.sep}" in file or file in _OWN_FILES


def _is_in_backward_exchange() -> bool:
    """Whether a thread of autograd's, which gathers weights in a backward pass on a GPU, waits for other ranks."""
    own = threading.get_ident()
    return any(
        _is_exchange(frame)
        for thread, frame in sys._current_frames().items()
        if thread != own and frame.f_code.co_filename not in _OWN_FILES
    )


def _exchanges() -> int:
    """How many exchanges with other ranks this one has begun, in all groups."""
    groups: list[Any] = list(_world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)
