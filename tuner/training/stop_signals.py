"""Stopping on request: the running step finishes, or ends between its parts, and the run is saved.

A signal then raises `Interrupted`, and the same command goes on later. A request in the run's folder, which
`tuner train --stop` leaves there, ends the run: what it has learned becomes its model.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.training.devices import Devices


class Interrupted(Exception):  # noqa: N818 (an outcome, not an error)
    """A signal stopped the run after a finished step, which was saved, or in the first, of which nothing is kept."""

    def __init__(self, signal_number: int, step: int) -> None:
        where = f"after step {step}, saved" if step else "in its first step"
        super().__init__(f"stopped by {signal.Signals(signal_number).name} {where}")
        self.exit_code = 128 + signal_number


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a run to stop: Ctrl-C, a scheduler, a terminal that was closed."""


def heeded() -> list[signal.Signals]:
    """`STOPPING`, without SIGHUP where this process was told to ignore it, as `nohup` does.

    A shell has its background jobs ignore SIGINT too, but whoever sends that to one of them means it.
    """
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOPPING if number != signal.SIGHUP or not ignores_hangup]


class StopSignals:
    """`STOPPING`, and requests to end, agreed on by all ranks between steps and their parts."""

    def __init__(self, end_requested: Callable[[], bool] = lambda: False) -> None:
        """end_requested: whether the run is to end early."""
        self.agreed: int | None = None
        """The signal that all ranks stop for."""
        self.ends = False
        """Whether all ranks end the run early."""
        self._end_requested = end_requested
        self._received: int | None = None
        """The signal that this process was sent."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals meanwhile. Outside the main thread, which alone may, they act as before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in heeded()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def agree(self, devices: Devices) -> bool:
        """Whether to stop: if one rank was asked to, all stop. Every rank calls this at the same place."""
        # a rank that stopped alone would leave the others waiting in their next collective
        received, requested = devices.maxima([self._received or 0, int(self._end_requested())])
        self.agreed = received or None  # no signal has the number 0
        self.ends = bool(requested)
        return self.agreed is not None or self.ends

    def raise_if_agreed(self, step: int, total_steps: int) -> None:
        """Raise Interrupted where the run was stopped before its end."""
        if self.agreed is not None and step < total_steps:
            raise Interrupted(self.agreed, step)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        # only noted: the handler may run in the middle of an optimizer step, where nothing can be saved
        self._received = number
