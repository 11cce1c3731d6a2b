"""Which samples make up a step, and how they are packed into passes: planning by lengths alone, no tokens read.

A step is a function of (lengths, seed, tokens_per_step) alone. Passes and ranks come after it and change
memory and speed, never what a step learns from.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

LOOKAHEAD = 512
"""Samples of the shuffle looked at to fill the end of a step; keeps the order close to the shuffle."""


@dataclass(frozen=True)
class StepPlan:
    """The samples of one optimiser step, in the order of the shuffle."""

    samples: np.ndarray
    """Indices of the samples, int64 [N]; one may occur twice where an epoch ends inside the step."""

    epoch: float
    """Epochs begun when the step is over: 1.5 is half-way through the second."""


def plan_steps(
    lengths: np.ndarray, tokens_per_step: int, order: Callable[[int], np.ndarray], epochs: float
) -> list[StepPlan]:
    """Cut the shuffles of all epochs into steps of at most `tokens_per_step` tokens; nothing lost or cut.

    lengths: int64 [N], tokens of each sample. order(epoch): the samples of that epoch, shuffled.
    When the next sample does not fit any more, the step is filled from the next LOOKAHEAD ones; what was
    passed over opens the next step. The last step is what remains.
    Raises ValueError when a sample is longer than a step.
    """
    if len(lengths) and lengths.max() > tokens_per_step:
        raise ValueError(f"a sample of {lengths.max()} tokens is longer than a step of {tokens_per_step}")
    stream = _Shuffled(lengths, order, epochs)
    steps = []
    while (step := _cut_step(stream, tokens_per_step)) is not None:
        steps.append(step)
    return steps


class _Shuffled:
    """Samples in the order they are to be learned, over all epochs, with those passed over first."""

    def __init__(self, lengths: np.ndarray, order: Callable[[int], np.ndarray], epochs: float) -> None:
        self._lengths, self._order, self._epochs = lengths, order, epochs
        self._epoch = 0
        self._refill()
        self.waiting: list[tuple[int, int]] = []
        """(sample, length) looked at and not yet taken."""

    def _refill(self) -> None:
        share = min(self._epochs - self._epoch, 1.0)
        count = round(share * len(self._lengths)) if share > 0 else 0
        samples = self._order(self._epoch)[:count]
        self._samples, self._sizes = samples.tolist(), self._lengths[samples].tolist()
        self._at = 0

    @property
    def epoch(self) -> float:
        return self._epoch + self._at / max(1, len(self._lengths))

    def next(self) -> tuple[int, int] | None:
        while self._at == len(self._samples):
            if self._epoch + 1 >= self._epochs:
                return None
            self._epoch += 1
            self._refill()
        item = self._samples[self._at], self._sizes[self._at]
        self._at += 1
        return item


def _cut_step(stream: _Shuffled, budget: int) -> StepPlan | None:
    samples: list[int] = []
    passed_over: list[tuple[int, int]] = []
    looked = 0
    waiting = iter(stream.waiting)
    while budget and looked < LOOKAHEAD:
        item = next(waiting, None) or stream.next()
        if item is None:
            break
        if item[1] <= budget:
            samples.append(item[0])
            budget -= item[1]
        else:
            passed_over.append(item)
            looked += 1
    stream.waiting = [*passed_over, *waiting]
    return StepPlan(np.asarray(samples, dtype=np.int64), stream.epoch) if samples else None


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions in `lengths`, grouped so that no group is over `capacity` tokens and the groups are few.

    Best-fit decreasing; where that needs more groups than the tokens would fill, groups are completed one by
    one by subset sums, and the fewer of the two taken. A function of the lengths alone.
    Raises ValueError when a sample is over the capacity.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sample of {max(lengths)} tokens is longer than a pass of {capacity}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    fitted = _best_fit(lengths, order, capacity)
    if len(fitted) * capacity < sum(lengths) + capacity:
        return fitted
    completed = _complete(lengths, order, capacity)
    return completed if len(completed) < len(fitted) else fitted


def _best_fit(lengths: Sequence[int], order: list[int], capacity: int) -> list[list[int]]:
    """Each sample, longest first, goes where it leaves the least room; among equal rooms to the oldest."""
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, group), sorted
    for index in order:
        place = bisect_left(rooms, (lengths[index], -1))
        if place == len(rooms):
            groups.append([index])
            room, group = capacity, len(groups) - 1
        else:
            room, group = rooms.pop(place)
            groups[group].append(index)
        if room > lengths[index]:
            insort(rooms, (room - lengths[index], group))
    return groups


def _complete(lengths: Sequence[int], order: list[int], capacity: int) -> list[list[int]]:
    """Each group is the longest sample left and the subset of the others that fills its room best."""
    groups: list[list[int]] = []
    while order:
        first, rest = order[0], order[1:]
        chosen = _best_subset([lengths[index] for index in rest], capacity - lengths[first])
        groups.append([first, *(rest[place] for place in chosen)])
        order = [index for place, index in enumerate(rest) if place not in chosen]
    return groups


def _best_subset(sizes: list[int], room: int) -> set[int]:
    """Places whose sizes sum closest to `room` from below: bit s of `reachable` says that sum s can be had."""
    within = (1 << (room + 1)) - 1
    reachable, history = 1, []
    for size in sizes:
        history.append(reachable)
        reachable |= (reachable << size) & within
        if reachable >> room:
            break
    total, chosen = reachable.bit_length() - 1, set()
    for place in range(len(history) - 1, -1, -1):
        if not history[place] >> total & 1:
            chosen.add(place)
            total -= sizes[place]
    return chosen


def deal(items: Sequence[T], rank: int, world: int) -> list[T]:
    """What one rank gets of some passes or rows, dealt round; a rank may get none."""
    return list(items[rank::world])


def shuffled(count: int, seed: int) -> Callable[[int], np.ndarray]:
    """The order of an epoch: a permutation of all samples, drawn from (seed, epoch)."""
    return lambda epoch: np.random.default_rng((seed, epoch)).permutation(count)


def mixed(
    lengths: np.ndarray, sources: np.ndarray, shares: Sequence[float], seed: int
) -> Callable[[int], np.ndarray]:
    """The order of an epoch when sources have shares: each source shuffled, and drawn from so that its
    tokens keep to its share while it lasts; then the others go on among themselves."""

    def order(epoch: int) -> np.ndarray:
        generator = np.random.default_rng((seed, epoch))
        samples = generator.permutation(len(lengths))
        progress = np.empty(len(lengths))  # tokens of the source drawn before this sample, over its share
        for source, share in enumerate(shares):
            own = samples[sources[samples] == source]
            before = np.cumsum(lengths[own]) - lengths[own]
            progress[own] = (before + generator.random(len(own)) * lengths[own]) / share
        return samples[np.argsort(progress[samples], kind="stable")]

    return order


def exhausted(steps: Sequence[StepPlan], sources: np.ndarray, count: int) -> Iterator[tuple[int, int]]:
    """(source, index of the step that draws its last sample of the first epoch), for sources that end early."""
    remaining = np.bincount(sources, minlength=count)
    for index, step in enumerate(steps):
        drawn = np.bincount(sources[step.samples], minlength=count)
        ended = (remaining > 0) & (remaining <= drawn)
        remaining -= drawn
        for source in np.flatnonzero(ended):
            if remaining.max() > 0:
                yield int(source), index
