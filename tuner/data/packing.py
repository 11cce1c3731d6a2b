"""The samples of each step, and their packing into passes: planned from lengths alone, without reading tokens.

The samples of a step are a function of (lengths, seed, tokens_per_step). Passes and ranks are chosen after that: they
change memory and speed, never what a step trains on.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LOOKAHEAD = 512
"""Samples that may be passed over to fill the end of a step; a bound keeps the order close to the shuffle."""


@dataclass(frozen=True)
class StepPlan:
    """The samples of one optimizer step, in the order of the shuffle."""

    samples: np.ndarray
    """Indices of the samples, int64 [N]; one may occur twice where an epoch ends inside the step."""

    epoch: float
    """Epochs completed after the step, with the fraction of the current one: 1.5 is half-way through the second."""


def plan_steps(
    lengths: np.ndarray, tokens_per_step: int, order: Callable[[int], np.ndarray], epochs: float
) -> list[StepPlan]:
    """Cut the shuffles of all epochs into steps of at most `tokens_per_step` tokens, losing and cutting no sample.

    lengths: int64 [N], tokens of each sample. order(epoch): the samples of that epoch (0-based), shuffled.
    When the next sample does not fit, later ones fill the step until LOOKAHEAD are passed over; these open the next
    step. The last step is what remains.
    Raises ValueError when a sample is longer than a step.
    """
    if len(lengths) and lengths.max() > tokens_per_step:
        raise ValueError(f"a sample of {lengths.max()} tokens is longer than a step of {tokens_per_step}")
    queue = _SampleQueue(lengths, order, epochs)
    steps: list[StepPlan] = []
    while (step := _cut_step(queue, tokens_per_step)) is not None:
        steps.append(step)
    return steps


class _SampleQueue:
    """The samples of all epochs in their order, and those that were passed over."""

    def __init__(self, lengths: np.ndarray, order: Callable[[int], np.ndarray], epochs: float) -> None:
        self._lengths, self._order, self._epochs = lengths, order, epochs
        self._epoch = 0
        self._load_epoch()
        self.passed_over: list[tuple[int, int]] = []
        """(sample, length) that did not fit the last step: the first of the next."""

    def _load_epoch(self) -> None:
        share = min(self._epochs - self._epoch, 1.0)
        count = round(share * len(self._lengths)) if share > 0 else 0
        samples = self._order(self._epoch)[:count]
        # as lists: reading arrays item by item is slow, and a run has millions of samples
        self._samples: list[int] = samples.tolist()
        self._sample_lengths: list[int] = self._lengths[samples].tolist()
        self._position = 0

    @property
    def epoch(self) -> float:
        return self._epoch + self._position / max(1, len(self._lengths))

    def next(self) -> tuple[int, int] | None:
        """(sample, its length); None after the last epoch."""
        # not `if`: the fraction of a last epoch may round to no sample at all
        while self._position == len(self._samples):
            if self._epoch + 1 >= self._epochs:
                return None
            self._epoch += 1
            self._load_epoch()
        item = self._samples[self._position], self._sample_lengths[self._position]
        self._position += 1
        return item


def _cut_step(queue: _SampleQueue, budget: int) -> StepPlan | None:
    """The next step of at most `budget` tokens; None when no sample is left."""
    samples: list[int] = []
    passed_over: list[tuple[int, int]] = []
    first = iter(queue.passed_over)
    while budget and len(passed_over) < LOOKAHEAD:
        item = next(first, None) or queue.next()
        if item is None:
            break
        sample, length = item
        if length <= budget:
            samples.append(sample)
            budget -= length
        else:
            passed_over.append(item)
    queue.passed_over = [*passed_over, *first]
    return StepPlan(np.asarray(samples, dtype=np.int64), queue.epoch) if samples else None


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths`, grouped so that no group exceeds `capacity` tokens and the groups are few.

    Best-fit decreasing. Where that needs more groups than the tokens would fill, each group is instead filled by a
    subset sum, and the better of the two packings is taken. A function of the lengths alone, so that every rank
    packs alike. Raises ValueError when a sample exceeds the capacity.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sample of {max(lengths)} tokens is longer than a pass of {capacity}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    best_fit = _pack_best_fit(lengths, order, capacity)
    # already as few groups as the tokens could fill: nothing can be better
    if len(best_fit) * capacity < sum(lengths) + capacity:
        return best_fit
    subset_sum = _pack_subset_sum(lengths, order, capacity)
    return subset_sum if len(subset_sum) < len(best_fit) else best_fit


def _pack_best_fit(lengths: Sequence[int], order: list[int], capacity: int) -> list[list[int]]:
    """Each sample, longest first, joins the group where it leaves the least room; of equal ones the oldest."""
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


def _pack_subset_sum(lengths: Sequence[int], order: list[int], capacity: int) -> list[list[int]]:
    """Each group is the longest sample left and the subset of the others that best fills the rest of its room."""
    groups: list[list[int]] = []
    while order:
        first, rest = order[0], order[1:]
        subset = _best_subset([lengths[index] for index in rest], capacity - lengths[first])
        groups.append([first, *(rest[place] for place in subset)])
        order = [index for place, index in enumerate(rest) if place not in subset]
    return groups


def _best_subset(sizes: list[int], room: int) -> set[int]:
    """Indices of the sizes whose sum is the largest that is at most `room`.

    Dynamic programming over an integer as a bit set: bit s of `reachable` is set when some subset sums to s.
    """
    # without the mask the integer would grow with every size, to the sum of them all
    mask = (1 << (room + 1)) - 1
    reachable = 1
    history: list[int] = []  # `reachable` before each size
    for size in sizes:
        history.append(reachable)
        reachable |= (reachable << size) & mask
        if reachable >> room:
            break
    total = reachable.bit_length() - 1
    subset: set[int] = set()
    for index in range(len(history) - 1, -1, -1):
        # the sizes before this one cannot sum to it, so this one is in the subset
        if not history[index] >> total & 1:
            subset.add(index)
            total -= sizes[index]
    return subset


@dataclass(frozen=True)
class Share:
    """One process's part of the passes that all of them make together."""

    rank: int = 0
    world: int = 1
    equal: bool = False
    """Whether every process makes as many passes as the others: those that hold a model in shards gather its layers
    together, and each waits for the others to make the same pass."""

    def of(self, passes: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """This process's passes, as indices of samples, dealt round-robin.

        It may get none; where all make as many, it gets empty ones for those it lacks.
        """
        own = list(passes[self.rank :: self.world])
        lacking = -(-len(passes) // self.world) - len(own) if self.equal else 0
        return [*own, *([()] * lacking)]


ALONE = Share()
"""The share of a process that is the only one: all."""


def shuffled(count: int, seed: int) -> Callable[[int], np.ndarray]:
    """Order of an epoch (0-based): a random permutation of all samples, seeded by (seed, epoch)."""
    # seeded by the epoch too, so that a resumed run need not draw the epochs before its own
    return lambda epoch: np.random.default_rng((seed, epoch)).permutation(count)


def mixed(
    lengths: np.ndarray, sources: np.ndarray, shares: Sequence[float], seed: int
) -> Callable[[int], np.ndarray]:
    """Order of an epoch (0-based) when sources have shares: int64 [N] of that epoch.

    Each source is shuffled, and interleaved with the others so that its share of the tokens holds until it is
    exhausted; then the others go on in their proportions.
    """

    def order(epoch: int) -> np.ndarray:
        generator = np.random.default_rng((seed, epoch))
        samples = generator.permutation(len(lengths))
        progress = np.empty(len(lengths))  # tokens of the source drawn before this sample, over its share
        for source, share in enumerate(shares):
            of_source = samples[sources[samples] == source]
            sizes = lengths[of_source]
            # a random point of each sample: at its beginning, every source's first would lead the epoch
            progress[of_source] = (np.cumsum(sizes) - sizes + generator.random(len(sizes)) * sizes) / share
        return samples[np.argsort(progress[samples], kind="stable")]

    return order


def strata(
    lengths: np.ndarray, sources: np.ndarray, shares: Sequence[float], below: int, short: float
) -> tuple[np.ndarray, list[float]]:
    """Short and long samples as two sources each: (number of each sample's, int64 [N], and the share of each).

    below: tokens from which a sample is long. short: share of the short ones; in both, sources keep theirs. A source's
    long samples have the number after that of its short ones.
    """
    parts = 2 * sources.astype(np.int64) + (lengths >= below)
    present = np.bincount(parts, minlength=2 * len(shares)).reshape(-1, 2) > 0
    # among the sources that have such samples: else a source without any would take its share from all
    totals = np.where(present, np.asarray(shares)[:, None], 0.0).sum(axis=0)
    of_length = np.array([short, 1 - short]) / np.where(totals > 0, totals, 1.0)
    return parts, (np.asarray(shares)[:, None] * of_length).reshape(-1).tolist()


def exhausted(steps: Sequence[StepPlan], sources: np.ndarray, count: int) -> Iterator[tuple[int, int]]:
    """(source, step that draws its last sample of the first epoch) of every source that ends before another."""
    remaining = np.bincount(sources, minlength=count)
    for index, step in enumerate(steps):
        drawn = np.bincount(sources[step.samples], minlength=count)
        ending = (remaining > 0) & (remaining <= drawn)
        remaining -= drawn
        for source in np.flatnonzero(ending):
            if remaining.max() > 0:
                yield int(source), index
