"""Tokenized preferences: comparisons of several answers' sequences, and the pairs these form.

Shapes: R rows (one comparison each), N sequences (one for each answer), P pairs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.data.examples import Collector, Examples, Sample, ranges


@dataclass(frozen=True)
class Comparisons:
    """R rows of answers to one prompt each. A row is never split: it is shuffled, packed and counted whole."""

    sequences: Examples
    """The N conversations, one answer each. For a reward model only the token at which the score is read has a weight;
    for a policy, the tokens of the assistant's turns in the answer."""
    offsets: np.ndarray
    """int64 [R + 1]: row r has the sequences offsets[r] to offsets[r + 1], best first."""
    starts: np.ndarray
    """int64 [N]: index in its sequence of the answer's first token."""
    pair_offsets: np.ndarray
    """int64 [R + 1]: row r has the pairs pair_offsets[r] to pair_offsets[r + 1]."""
    better: np.ndarray
    """int64 [P]: the better answer of each pair, as an index within its row."""
    worse: np.ndarray
    """int64 [P]: the worse answer, likewise."""
    weights: np.ndarray
    """float32 [P]: those of a row's pairs sum to the row's weight, so that a long list counts no more than a pair."""
    margins: np.ndarray
    """float32 [P]: score by which the better answer must lead."""
    conditions: np.ndarray
    """int32 [R]: index into condition_names; -1 where a row has none."""
    condition_names: tuple[str, ...]
    twins: np.ndarray
    """int64 [R]: hash of the prompt and the set of answers; rows that share it differ only in condition or ranking."""
    cut: np.ndarray
    """bool [R]: whether the prompt was truncated to max_length."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R]: tokens of a row, over the sequences of all its answers."""
        return np.diff(self.sequences.offsets[self.offsets])

    @property
    def sources(self) -> np.ndarray:
        """int32 [R]: number of the config's source that a row comes from."""
        return self.sequences.sources[self.offsets[:-1]]

    def origin(self, index: int) -> str:
        """`file:line` of a row."""
        return self.sequences.origin(int(self.offsets[index]))

    def condition(self, index: int) -> str | None:
        """Name of a row's condition; None where it has none."""
        number = int(self.conditions[index])
        return self.condition_names[number] if number >= 0 else None

    def describe(self, sequence: int) -> str:
        """A label for a sequence: its place among the row's answers, and the condition."""
        row = int(np.searchsorted(self.offsets, sequence, side="right")) - 1
        begin, end = int(self.offsets[row]), int(self.offsets[row + 1])
        place, count = sequence - begin + 1, end - begin
        rank = ("better", "worse")[place - 1] if count == 2 else f"answer {place} of {count}, best first"
        condition = self.condition(row)
        return rank if condition is None else f"{rank}, {condition}"

    def answers(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64: indices of the sequences of some rows, row by row."""
        return ranges(self.offsets, rows)

    def pairs(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64: indices of the pairs of some rows, row by row."""
        return ranges(self.pair_offsets, rows)

    def totals(self, rows: Sequence[int]) -> dict[str, float]:
        """Summed weights of some rows: of their `pairs`, and of their `answers`, each counted once."""
        # the score is read at the last token: no other one has a weight
        last = self.sequences.offsets[self.answers(rows) + 1] - 1
        return {
            # fp64: the loss is divided by this sum, which fp32 would round differently in another order
            "pairs": float(self.weights[self.pairs(rows)].sum(dtype=np.float64)),
            "answers": float(self.sequences.weights_T[last].sum(dtype=np.float64)),
        }

    def take(self, rows: Sequence[int] | np.ndarray) -> "Comparisons":
        """The rows of these indices, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        answers, pairs = self.answers(rows), self.pairs(rows)
        return Comparisons(
            sequences=self.sequences.take(answers),
            offsets=_offsets(np.diff(self.offsets)[rows]),
            starts=self.starts[answers],
            pair_offsets=_offsets(np.diff(self.pair_offsets)[rows]),
            better=self.better[pairs],
            worse=self.worse[pairs],
            weights=self.weights[pairs],
            margins=self.margins[pairs],
            conditions=self.conditions[rows],
            condition_names=self.condition_names,
            twins=self.twins[rows],
            cut=self.cut[rows],
        )

    def fingerprint(self) -> str:
        """Hash of all that the loss depends on, in order: equal for equal rows, whichever files they come from."""
        digest = hashlib.blake2b(self.sequences.fingerprint().encode(), digest_size=16)
        for array in (self.offsets, self.pair_offsets, self.better, self.worse, self.weights, self.margins):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class TokenizedComparison:
    """One row's answers as token sequences."""

    samples: list[Sample]
    """(tokens, weights) of each answer's sequence, best first."""
    starts: list[int]
    """Index in each sequence of the answer's first token."""
    ranks: tuple[int, ...]
    margin: float
    weight: float
    condition: str | None
    twin: int
    """See Comparisons.twins."""
    cut: bool = False


class ComparisonCollector:
    """Collects rows into Comparisons. ties: whether answers of equal rank form a pair each way, at half the weight."""

    def __init__(self, condition_names: tuple[str, ...], ties: bool) -> None:
        self._names, self._ties = condition_names, ties
        self._sequences = Collector()
        self._rows: list[TokenizedComparison] = []
        self._pairs: list[list[tuple[int, int, float]]] = []

    def add(self, row: TokenizedComparison, source: int, file: str, line: int) -> None:
        """Append a row read from `file:line`; source: the number of its source."""
        for sample in row.samples:
            self._sequences.add(sample, source, file, line)
        self._rows.append(row)
        self._pairs.append(pairs_of(row.ranks, self._ties))

    def finish(self) -> Comparisons | None:
        """All rows that were added; None when there are none."""
        sequences = self._sequences.finish()
        if sequences is None:
            return None
        counts = [len(pairs) for pairs in self._pairs]
        better, worse, shares = zip(*(pair for pairs in self._pairs for pair in pairs), strict=True)
        per_pair = {
            name: np.repeat(np.array([getattr(row, name) for row in self._rows], np.float32), counts)
            for name in ("weight", "margin")
        }
        condition_numbers = {name: number for number, name in enumerate(self._names)}
        return Comparisons(
            sequences=sequences,
            offsets=_offsets(np.array([len(row.samples) for row in self._rows])),
            starts=np.array([start for row in self._rows for start in row.starts], dtype=np.int64),
            pair_offsets=_offsets(np.array(counts)),
            better=np.array(better, dtype=np.int64),
            worse=np.array(worse, dtype=np.int64),
            weights=np.array(shares, dtype=np.float32) * per_pair["weight"],
            margins=per_pair["margin"],
            conditions=np.array(
                [condition_numbers.get(row.condition or "", -1) for row in self._rows], dtype=np.int32
            ),
            condition_names=self._names,
            twins=np.array([row.twin for row in self._rows], dtype=np.int64),
            cut=np.array([row.cut for row in self._rows], dtype=bool),
        )


def pairs_of(ranks: Sequence[int], ties: bool) -> list[tuple[int, int, float]]:
    """(better, worse, share of the row's weight) of every pair of a ranked list, once; the shares sum to 1.

    ranks: never decreasing. ties: whether two answers of equal rank form a pair each way at half the share, or none.
    """
    pairs = [
        (better, worse, 1.0)
        for better in range(len(ranks))
        for worse in range(better + 1, len(ranks))
        if ranks[better] < ranks[worse]
    ]
    if ties:
        pairs += [
            (first, second, 0.5)
            for first in range(len(ranks))
            for second in range(len(ranks))
            if first != second and ranks[first] == ranks[second]
        ]
    # unnormalized, a list of n answers would count as much as n (n - 1) / 2 rows with one pair
    total = sum(share for _, _, share in pairs)
    return [(better, worse, share / total) for better, worse, share in pairs]


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
