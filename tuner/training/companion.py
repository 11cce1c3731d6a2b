"""A rank's companion: a small process that tells the other ranks of it, and hears of them.

It is a process and not a thread, as a thread says nothing while another one holds the interpreter: to parse a large
JSON file, or in a regular expression of a reward rule. It sees of its rank what the kernel tells (whether it lives, is
stopped, computes or reads), and what the rank's own thread writes into a pipe.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from tuner.printable import printable
from tuner.training.signs_of_life import (
    ENDED_SECONDS,
    IDLE_SECONDS,
    NOTICE_SECONDS,
    REMINDER_SECONDS,
    SILENT_SECONDS,
    Sign,
    Verdict,
    judge,
)

BEAT_SECONDS = 2.0
STALE_SECONDS = 10.0
"""A note so old is not believed: the rank's interpreter is held, so that it does not wait for others any more; and a
companion that has slept so long knows nothing of how long others have been silent."""
OBEY_SECONDS = 10.0
"""How long a rank may take to end by itself before it is killed."""
ANSWER_SECONDS = 5.0
"""How long the store may take to answer."""
CLOCK_TICK = os.sysconf("SC_CLK_TCK")
LEAST_LOAD = 0.02
LEAST_BYTES = 2**16
"""Processor time in seconds per second, and bytes read and written, from which on a rank is taken to work."""


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet, and which one this is."""

    address: str
    port: int
    rank: int
    world: int
    spins: bool
    """Whether a rank that waits for others uses processor time, as with a GPU."""

    @property
    def is_launchers(self) -> bool:
        """Whether torchrun keeps the store."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    @property
    def keeper(self) -> str:
        """Who keeps the store in which the ranks meet."""
        owner = "the launcher" if self.is_launchers else "rank 0"
        return f"{owner} at {self.address}:{self.port}"

    def key(self, name: str | int) -> str:
        """A name in the store. In torchrun's, ranks that are started again do not read what those before have left;
        a store of rank 0's own ends with them (and on several machines, counts of restarts differ)."""
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if self.is_launchers else "0"
        return f"tuner/{restarts}/{name}"


class Companion:
    """The companion's side of a heartbeat; it ends with its rank."""

    def __init__(self, meeting: Meeting, *, notes: int, orders: int) -> None:
        """notes, orders: the ends of the pipes from and to the rank."""
        self._meeting, self._notes, self._orders = meeting, notes, orders
        self._parent, self._begun, self._stderr = os.getppid(), time.monotonic(), 2
        self._own = Sign(host=socket.gethostname(), pid=self._parent)
        self._store: TCPStore | None = None
        self._due, self._parted = threading.Event(), threading.Event()
        self._answered = self._looked = self._noted = self._moved = self._begun
        self._activity: tuple[float, ...] = (0.0, 0.0, 0.0)
        self._moves, self._beats = -1, 0
        self._pending = b""
        self._heard: dict[int, tuple[bytes, float]] = {}
        """Rank -> its last sign as it came, and when."""
        self._noticed: float | None = None
        self._read_notice = b""

    def live(self) -> NoReturn:
        """Beat until the rank ends."""
        try:
            self._leave_what_is_the_ranks()
            threading.Thread(target=self._meet, daemon=True).start()
            while self._listen():
                self._look()
                self._due.set()
                self._judge_keeper(time.monotonic() - self._answered)
            self._own = replace(self._own, state="ended")
            self._due.set()
            self._parted.wait(ANSWER_SECONDS)
        except BaseException as error:
            self._give_up(error)
        finally:
            os._exit(0)

    def _give_up(self, error: BaseException) -> NoReturn:
        """A fault of tuner's own: the others take the rank for gone, as nobody tells them of it."""
        os.write(
            self._stderr, f"tuner: the heartbeat of rank {self._meeting.rank} failed: {error!r}\n".encode()
        )
        os._exit(1)

    def _leave_what_is_the_ranks(self) -> None:
        """Signals, open files and memory of the rank: an open socket would hide from the others that it has ended."""
        gc.disable()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # to torch's own lines of a store that has gone, a sentence is preferred
        self._stderr, nothing = os.dup(2), os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        kept = {0, 1, 2, self._stderr, self._notes, self._orders}
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in kept:
                try:
                    os.close(int(name))
                except OSError:
                    continue  # the listing's own
        os.set_blocking(self._notes, False)

    # The rank

    def _listen(self) -> bool:
        """Read what the rank's thread has written, for the time of a beat; False: the rank has ended."""
        deadline = time.monotonic() + BEAT_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._notes], [], [], left)[0]:
                break
            received = os.read(self._notes, 65536)
            if not received:
                return False
            *lines, self._pending = (self._pending + received).split(b"\n")
            if lines:
                self._take(json.loads(lines[-1]))
        return os.getppid() == self._parent

    def _take(self, note: dict[str, Any]) -> None:
        self._noted = time.monotonic()
        moves = note.pop("moves")
        if moves != self._moves:
            self._moves, self._moved = moves, self._noted
        self._own = replace(self._own, **note)

    def _look(self) -> None:
        """See whether the rank has come forward since the last look."""
        now, activity = time.monotonic(), _activity(self._parent) or self._activity
        slept = now - self._looked > STALE_SECONDS
        seconds, self._looked = max(now - self._looked, 0.1), now
        processor, faults, transferred = (
            new - old for new, old in zip(activity, self._activity, strict=True)
        )
        self._activity = activity
        spins = self._own.waits and self._meeting.spins
        if slept or (processor > LEAST_LOAD * seconds and not spins) or faults or transferred > LEAST_BYTES:
            self._moved = now
        if slept:  # stopped, perhaps with all others: their silence says nothing
            self._heard = {rank: (text, now) for rank, (text, _) in self._heard.items()}
            self._answered = now
        state = "stopped" if _is_stopped(self._parent) else "runs"
        waits = self._own.waits and now - self._noted < STALE_SECONDS and state == "runs"
        self._own = replace(self._own, state=state, waits=waits, still=now - self._moved)

    # The others

    def _meet(self) -> None:
        """Tell the others and hear them at every beat: in a thread, as a store that hangs does not answer."""
        try:
            while not self._parted.is_set():
                self._due.wait()
                self._due.clear()
                sign = self._own
                try:
                    self._tell(sign)
                    if sign.state != "ended":
                        self._hear(sign)
                    self._answered = time.monotonic()
                except (RuntimeError, OSError):  # the store has gone, or is not there yet
                    self._store = None
                if sign.state == "ended":
                    self._parted.set()
        except BaseException as error:
            self._give_up(error)

    def _hear(self, sign: Sign) -> None:
        self._hear_verdict()
        self._hear_of(0)  # where it keeps the store, this is the last that is heard of it
        if sign.waits:
            self._hear_others(sign)

    def _tell(self, sign: Sign) -> None:
        self._beats += 1
        text = json.dumps(asdict(sign) | {"beat": self._beats})
        self._meeting_store().set(self._meeting.key(self._meeting.rank), text)

    def _meeting_store(self) -> TCPStore:
        if self._store is None:
            address, port = self._meeting.address, self._meeting.port
            # first by hand: a store that is not there yet makes torch write warnings
            socket.create_connection((address, port), timeout=ANSWER_SECONDS).close()
            patience = timedelta(seconds=ANSWER_SECONDS)
            self._store = TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
        return self._store

    def _hear_others(self, own: Sign) -> None:
        """Judge the others, where this rank waits for them."""
        now, meeting, store = time.monotonic(), self._meeting, self._meeting_store()
        for rank in range(meeting.world):
            self._hear_of(rank)
        if own.still < ENDED_SECONDS:
            self._noticed = None
            return
        signs = {rank: self._sign(rank, now) for rank in range(meeting.world)} | {meeting.rank: own}
        verdict = judge(signs, own.still)
        if verdict is None:
            return
        if verdict.ends:
            store.compare_set(meeting.key("verdict"), "", _packed(verdict))
        elif self._is_first_that_waits(signs) and (
            self._noticed is None or now - self._noticed >= REMINDER_SECONDS
        ):
            self._noticed = now
            store.set(meeting.key("notice"), _packed(verdict))

    def _hear_of(self, rank: int) -> None:
        key, store = self._meeting.key(rank), self._meeting_store()
        if rank in self._heard or store.check([key]):
            text = store.get(key)
            if text != self._heard.get(rank, (b"", 0.0))[0]:
                self._heard[rank] = text, time.monotonic()

    def _sign(self, rank: int, now: float) -> Sign:
        if rank not in self._heard:
            return Sign(still=now - self._begun)
        text, heard = self._heard[rank]
        fields = json.loads(text)
        del fields["beat"]
        silent = now - heard
        return replace(Sign(**fields), silent=silent, still=fields["still"] + silent)

    def _is_first_that_waits(self, signs: dict[int, Sign]) -> bool:
        return self._meeting.rank == min(rank for rank, sign in signs.items() if sign.waits)

    def _hear_verdict(self) -> None:
        """Say what a rank has noticed of another, and end this rank where the run cannot go on."""
        store, meeting = self._meeting_store(), self._meeting
        if meeting.rank == 0 and store.check([meeting.key("notice")]):
            notice = store.get(meeting.key("notice"))
            if notice != self._read_notice:
                self._read_notice = notice
                self._say(_unpacked(notice).sentence)
        if store.check([meeting.key("verdict")]):
            verdict = _unpacked(store.get(meeting.key("verdict")))
            self._end_rank(verdict.sentence, says=meeting.rank == 0 or 0 in verdict.ranks)

    def _judge_keeper(self, seconds: float) -> None:
        """What to do without the store for so many seconds."""
        keeper, has_met = self._meeting.keeper, bool(self._beats > 1)
        if not has_met:
            if seconds >= IDLE_SECONDS:
                self._end_rank(f"{keeper} cannot be reached for {seconds:.0f} s", says=True)
            elif seconds >= NOTICE_SECONDS and self._noticed is None:
                self._noticed = seconds
                self._say(f"{keeper} cannot be reached for {seconds:.0f} s; waiting for it")
            return
        # a rank that does not wait for others may not need them any more
        if seconds >= SILENT_SECONDS - ANSWER_SECONDS and (self._own.waits or self._own.state == "stopped"):
            sign = self._sign(0, time.monotonic())
            last = f"; rank 0 was last in: {sign.doing}, {sign.place}" if sign.doing else ""
            sentence = (
                f"{keeper}, where the ranks meet, has not answered for {seconds:.0f} s: it is gone, or hangs"
            )
            self._end_rank(sentence + last, says=self._own.waits)

    def _end_rank(self, sentence: str, *, says: bool) -> NoReturn:
        """Have the rank end, and end."""
        sentence += "; run the same command again to go on from the last checkpoint"
        if says:
            self._print(sentence)
        self._order("end", sentence)
        deadline = time.monotonic() + OBEY_SECONDS
        while time.monotonic() < deadline and os.getppid() == self._parent:
            time.sleep(0.1)
        if os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGKILL)
        os._exit(0)

    def _say(self, sentence: str) -> None:
        self._print(sentence)
        self._order("say", sentence)

    def _print(self, sentence: str) -> None:
        # not through Python's stderr, whose lock another thread of the rank may have held when this process began
        os.write(self._stderr, f"{printable(f'tuner: {sentence}')}\n".encode())

    def _order(self, name: str, sentence: str) -> None:
        os.write(self._orders, json.dumps({name: sentence}).encode() + b"\n")


def _stat(process: int) -> list[str]:
    """Fields of /proc/PROCESS/stat from the third on; empty where the process has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _activity(process: int) -> tuple[float, ...] | None:
    """A process's processor seconds, page faults that read from a disk, and bytes read and written."""
    fields = _stat(process)
    if not fields:
        return None
    transferred = 0
    with suppress(OSError):  # some systems show it to nobody
        lines = Path(f"/proc/{process}/io").read_text(encoding="utf-8").splitlines()
        transferred = sum(int(line.split()[1]) for line in lines if line.startswith(("rchar:", "wchar:")))
    user, system, faults = int(fields[11]), int(fields[12]), int(fields[9])
    return (user + system) / CLOCK_TICK, faults, transferred


def _is_stopped(process: int) -> bool:
    return _stat(process)[:1] in (["t"], ["T"])


def _packed(verdict: Verdict) -> str:
    return json.dumps(asdict(verdict))


def _unpacked(text: bytes) -> Verdict:
    return Verdict(**json.loads(text))
