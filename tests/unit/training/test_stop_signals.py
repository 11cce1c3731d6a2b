"""Signals ask for an end of the run, which all ranks agree on."""

import os
import signal
import threading

import pytest

from tuner.training.stop_signals import Interrupted, StopSignals


class Ranks:
    """Devices of which the other ranks have received these signals."""

    def __init__(self, *others: int | None) -> None:
        self._others = [(number or 0, 0) for number in others]

    def maxima(self, values: list[int]) -> list[int]:
        return [max(of_ranks) for of_ranks in zip(values, *self._others, strict=True)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_heard_while_listening_and_only_then(number, code):
    before = signal.getsignal(number)
    signals = StopSignals()
    with signals.listening():
        assert not signals.agree(Ranks())
        os.kill(os.getpid(), number)
        assert signals.agree(Ranks())
    assert signal.getsignal(number) == before
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step 3, saved") as interrupted:
        signals.raise_if_agreed(3, 5)
    assert interrupted.value.exit_code == code


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = StopSignals()
        with signals.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.agree(Ranks())
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_rank_that_was_asked_stops_all():
    signals = StopSignals()
    assert signals.agree(Ranks(None, signal.SIGINT, None))
    assert signals.agreed == signal.SIGINT


def test_a_request_to_end_stops_all_without_an_interrupt():
    signals = StopSignals(lambda: True)
    assert signals.agree(Ranks(None, None))
    assert signals.ends
    signals.raise_if_agreed(3, 5)


def test_a_run_at_its_end_is_not_interrupted():
    signals = StopSignals()
    signals.agree(Ranks(signal.SIGTERM))
    signals.raise_if_agreed(5, 5)


def test_a_second_interrupt_does_not_wait():
    with StopSignals().listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_leaves_the_handlers_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def listen() -> None:
        with StopSignals().listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]
