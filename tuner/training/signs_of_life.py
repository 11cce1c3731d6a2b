"""What ranks tell of themselves, and what a rank that waits for others makes of it. No processes, no clocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SILENT_SECONDS = 40.0
"""Without a sign of life, or without a step forward where nobody makes one: it will not come back. Signs come every
two seconds from a process of their own, so that load or long work delays them by a few seconds at most."""
ENDED_SECONDS = 5.0
"""How long a launcher is left to report a rank that has ended, which it knows at once if it runs on that machine."""
NOTICE_SECONDS = 45.0
"""A wait for a rank that works is told after so long, and again after `REMINDER_SECONDS`."""
REMINDER_SECONDS = 600.0
IDLE_SECONDS = 600.0
"""Outside of an exchange, a rank that waits for something else (a reward server, a disk) uses no processor time either,
and may be right to: it is given up after so long in one place."""


@dataclass(frozen=True)
class Sign:
    """What a rank told last, as another rank sees it."""

    host: str = ""
    pid: int = 0
    state: Literal["runs", "stopped", "ended"] = "runs"
    doing: str = ""
    """The part of the run, such as `step 3, scores`."""
    place: str = ""
    """Line of tuner's or the user's code that its main thread is in."""
    met: bool = False
    """Whether it has met the others: their group exists."""
    waits: bool = False
    """Whether it is in an exchange with other ranks."""
    still: float = 0.0
    """Seconds without a step forward: no other line, no exchange, no processor time, nothing read or written."""
    silent: float = 0.0
    """Seconds since this was told."""


@dataclass(frozen=True)
class Verdict:
    """A sentence about ranks that others wait for."""

    sentence: str
    ends: bool
    """Whether the run cannot go on."""
    ranks: tuple[int, ...] = ()
    """The ranks that it is about."""


def judge(signs: Mapping[int, Sign], waited: float) -> Verdict | None:
    """What a rank that has waited for so many seconds says of the others; None: it waits on.

    signs: of all ranks, itself included; of one that has not started yet, an empty sign.
    """
    if any(sign.met for sign in signs.values()):  # then all have started
        signs = {rank: sign for rank, sign in signs.items() if sign.host}
    for rank, sign in signs.items():
        if reason := _death(sign, waited):
            return Verdict(f"{_name(rank, sign)} {reason}; {_last(sign)}", True, (rank,))
    if all(sign.waits and sign.still >= SILENT_SECONDS for sign in signs.values()):
        return Verdict(_deadlock(signs), True, tuple(signs))
    busy = [(rank, sign) for rank, sign in signs.items() if not sign.waits]
    if not busy or waited < NOTICE_SECONDS:
        return None
    rank, sign = max(busy, key=lambda pair: pair[1].still)
    if not sign.host:
        return Verdict(f"rank {rank} has not started, and the others wait for it", False, (rank,))
    pace = f"it has not moved for {sign.still:.0f} s" if sign.still >= SILENT_SECONDS else "it works"
    sentence = f"waiting for {_name(rank, sign)} for {waited:.0f} s: {_whereabouts(sign)}; {pace}"
    return Verdict(sentence, False, (rank,))


def _death(sign: Sign, waited: float) -> str | None:
    """Why a rank will not come; None: it may."""
    if not sign.host:
        return f"has not started for {waited:.0f} s" if waited >= IDLE_SECONDS else None
    if sign.state == "ended":
        return "has ended, and its own output says why" if waited >= ENDED_SECONDS else None
    if sign.silent >= SILENT_SECONDS:
        return f"has given no sign of life for {sign.silent:.0f} s: its machine or the network is gone"
    if sign.state == "stopped" and sign.still >= SILENT_SECONDS:
        return f"has been stopped for {sign.still:.0f} s (SIGSTOP, or a debugger)"
    if not sign.waits and sign.still >= IDLE_SECONDS and waited >= IDLE_SECONDS:
        return f"hangs: it has not moved for {sign.still:.0f} s, and the others wait for it"
    return None


def _deadlock(signs: Mapping[int, Sign]) -> str:
    seconds = min(sign.still for sign in signs.values())
    places: dict[str, list[int]] = {}
    for rank, sign in signs.items():
        places.setdefault(_whereabouts(sign), []).append(rank)
    if len(places) == 1:
        return (
            f"all ranks have waited for each other for {seconds:.0f} s in one place, {next(iter(places))}: "
            "the network between them is gone"
        )
    where = "; ".join(
        f"{_name(ranks[0], signs[ranks[0]])}{f' and {len(ranks) - 1} more' if ranks[1:] else ''}: {place}"
        for place, ranks in sorted(places.items(), key=lambda item: len(item[1]))
    )
    return (
        f"ranks have waited for each other for {seconds:.0f} s in different places, and none gets on: {where}"
    )


def _name(rank: int, sign: Sign) -> str:
    return f"rank {rank} ({sign.host}, process {sign.pid})" if sign.host else f"rank {rank}"


def _whereabouts(sign: Sign) -> str:
    return ", ".join(filter(None, (sign.doing, sign.place))) or "start-up"


def _last(sign: Sign) -> str:
    return f"it was last in: {_whereabouts(sign)}" if sign.host else "start it, or start fewer"
