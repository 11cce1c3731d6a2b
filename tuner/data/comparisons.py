"""Tokenised answers that are compared: rows of sequences, and the pairs they make.

Shapes: R rows, N sequences (one for each answer), P pairs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.data.examples import Collector, Examples, ranges


@dataclass(frozen=True)
class Comparisons:
    """R rows of answers to one prompt each. A row is never split: it is what is drawn, packed and counted."""

    sequences: Examples
    """The N conversations, each with one answer, learned at the token where its score is read."""
    offsets: np.ndarray
    """int64 [R + 1]: row r is sequences offsets[r] to offsets[r + 1], the better first."""
    starts: np.ndarray
    """int64 [N]: where in its sequence the answer begins, in tokens."""
    pair_offsets: np.ndarray
    """int64 [R + 1]: the pairs of row r are pair_offsets[r] to pair_offsets[r + 1]."""
    better: np.ndarray
    """int64 [P]: the better answer of each pair, counted within its row."""
    worse: np.ndarray
    """int64 [P]."""
    weights: np.ndarray
    """float32 [P]: the pairs of a row sum to the row's weight, so that a prompt counts once."""
    margins: np.ndarray
    """float32 [P]: score by which the better answer must lead."""
    conditions: np.ndarray
    """int32 [R]: index into condition_names; -1 where a row has none."""
    condition_names: tuple[str, ...]
    twins: np.ndarray
    """int64 [R]: hash of prompt and answers in any order: rows that share it differ in condition or order alone."""
    cut: np.ndarray
    """bool [R]: whether the prompt was cut to max_length."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R]: tokens of all answers' sequences."""
        return np.diff(self.sequences.offsets[self.offsets])

    @property
    def sources(self) -> np.ndarray:
        """int32 [R]: which of the config's sources a row comes from."""
        return self.sequences.sources[self.offsets[:-1]]

    def origin(self, index: int) -> str:
        """`file:line` of a row."""
        return self.sequences.origin(int(self.offsets[index]))

    def condition(self, index: int) -> str | None:
        """Name of a row's condition."""
        return self.condition_names[self.conditions[index]] if self.conditions[index] >= 0 else None

    def describe(self, sequence: int) -> str:
        """Which answer a sequence is, in words: its place among the row's, and the condition."""
        row = int(np.searchsorted(self.offsets, sequence, side="right")) - 1
        place, count = sequence - self.offsets[row] + 1, self.offsets[row + 1] - self.offsets[row]
        which = ("better", "worse")[place - 1] if count == 2 else f"answer {place} of {count}, best first"
        condition = self.condition(row)
        return which if condition is None else f"{which}, {condition}"

    def answers(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64: the sequences of some rows, row by row."""
        return ranges(self.offsets, rows)

    def pairs(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64: the pairs of some rows, row by row."""
        return ranges(self.pair_offsets, rows)

    def totals(self, rows: Sequence[int]) -> dict[str, float]:
        """Summed weights of some rows: of their `pairs`, and of their `answers`, each counting once."""
        last = self.sequences.offsets[self.answers(rows) + 1] - 1
        return {
            "pairs": float(self.weights[self.pairs(rows)].sum(dtype=np.float64)),
            "answers": float(self.sequences.weights_T[last].sum(dtype=np.float64)),
        }

    def take(self, rows: Sequence[int] | np.ndarray) -> "Comparisons":
        """These rows, in this order."""
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
        """Hash of what is learned, in order: equal for equal rows, wherever they came from."""
        digest = hashlib.blake2b(self.sequences.fingerprint().encode(), digest_size=16)
        for array in (self.offsets, self.pair_offsets, self.better, self.worse, self.weights, self.margins):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Compared:
    """One row, tokenised."""

    samples: list[tuple[np.ndarray, np.ndarray]]
    """(tokens, weights) of each answer's sequence, the better first."""
    starts: list[int]
    ranks: tuple[int, ...]
    margin: float
    weight: float
    condition: str | None
    twin: int
    cut: bool = False


class ComparisonCollector:
    """Gathers rows into Comparisons. ties: whether answers of one rank make a pair each way, at half the weight."""

    def __init__(self, condition_names: tuple[str, ...], ties: bool) -> None:
        self._names, self._ties = condition_names, ties
        self._sequences = Collector()
        self._rows: list[Compared] = []
        self._pairs: list[list[tuple[int, int, float]]] = []

    def add(self, row: Compared, source: int, file: str, line: int) -> None:
        """One more row, from `file:line` of the source of that number."""
        for sample in row.samples:
            self._sequences.add(sample, source, file, line)
        self._rows.append(row)
        self._pairs.append(pairs_of(row.ranks, self._ties))

    def finish(self) -> Comparisons | None:
        """What was gathered; None when nothing was."""
        sequences = self._sequences.finish()
        if sequences is None:
            return None
        counts = [len(pairs) for pairs in self._pairs]
        better, worse, shares = zip(*(pair for pairs in self._pairs for pair in pairs), strict=True)
        per_pair = {
            name: np.repeat(np.array([getattr(row, name) for row in self._rows], np.float32), counts)
            for name in ("weight", "margin")
        }
        index = {name: place for place, name in enumerate(self._names)}
        return Comparisons(
            sequences=sequences,
            offsets=_offsets(np.array([len(row.samples) for row in self._rows])),
            starts=np.array([start for row in self._rows for start in row.starts], dtype=np.int64),
            pair_offsets=_offsets(np.array(counts)),
            better=np.array(better, dtype=np.int64),
            worse=np.array(worse, dtype=np.int64),
            weights=np.array(shares, dtype=np.float32) * per_pair["weight"],
            margins=per_pair["margin"],
            conditions=np.array([index.get(row.condition or "", -1) for row in self._rows], dtype=np.int32),
            condition_names=self._names,
            twins=np.array([row.twin for row in self._rows], dtype=np.int64),
            cut=np.array([row.cut for row in self._rows], dtype=bool),
        )


def pairs_of(ranks: Sequence[int], ties: bool) -> list[tuple[int, int, float]]:
    """(better, worse, share) of every pair of a ranked list, once; the shares sum to 1.

    ties: whether two answers of one rank are a pair each way at half the share; else they are none.
    """
    found = [
        (one, other, 1.0)
        for one in range(len(ranks))
        for other in range(one + 1, len(ranks))
        if ranks[one] < ranks[other]
    ]
    if ties:
        equal = [
            (one, other)
            for one in range(len(ranks))
            for other in range(len(ranks))
            if one != other and ranks[one] == ranks[other]
        ]
        found += [(one, other, 0.5) for one, other in equal]
    total = sum(share for _, _, share in found)
    return [(one, other, share / total) for one, other, share in found]


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
