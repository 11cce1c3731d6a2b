"""Some rows of a config's sources, drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.config.data import Source
from tuner.data.sources import Row, Rows


@dataclass(frozen=True)
class DrawnRows:
    """Rows of a source, in the order of its files."""

    source: Source
    rows: Sequence[Row]


def draw_rows(
    sources: Sequence[Source],
    count: int,
    seed: int,
    wanted: Callable[[Source], Callable[[Row], bool]] = lambda source: lambda row: True,
) -> list[DrawnRows]:
    """At most `count` rows, without repetition, in proportion to the sources' shares, or to their numbers of rows.

    The files are read twice, and only the rows drawn are held. wanted: gives what tells whether a row of a source may
    be drawn; each row is asked for once.
    """
    places = [_wanted_places(source, wanted(source)) for source in sources]
    sizes = np.array([len(of_source) for of_source in places])
    shares = np.array(
        [size if source.share is None else source.share for source, size in zip(sources, sizes, strict=True)]
    )
    random = np.random.default_rng(seed)
    drawn: list[DrawnRows] = []
    for source, of_source, number in zip(sources, places, apportion(shares, sizes, count), strict=True):
        chosen = np.sort(random.choice(len(of_source), number, replace=False))
        drawn.append(DrawnRows(source, list(_rows_at(source, of_source[chosen].tolist()))))
    return drawn


def _wanted_places(source: Source, is_wanted: Callable[[Row], bool]) -> np.ndarray:
    """int64: numbers of the rows that may be drawn, from 0."""
    return np.array([number for number, row in enumerate(Rows(source)) if is_wanted(row)], dtype=np.int64)


def apportion(shares: np.ndarray, sizes: np.ndarray, count: int) -> list[int]:
    """`count` split in proportion to shares, by largest remainders; none gets more than its size."""
    counts = np.zeros(len(sizes), dtype=np.int64)
    while (left := min(count, int(sizes.sum())) - int(counts.sum())) > 0:
        open_ = counts < sizes
        exact = left * np.where(open_, shares, 0) / shares[open_].sum()
        more = np.floor(exact).astype(np.int64)
        order = np.argsort(-(exact - more), kind="stable")
        more[order[: left - int(more.sum())]] += 1
        counts = np.minimum(counts + more, sizes)
    return counts.tolist()


def _rows_at(source: Source, places: list[int]) -> Iterator[Row]:
    wanted = iter(places)
    place = next(wanted, None)
    for number, row in enumerate(Rows(source)):
        if place is None:
            return
        if number == place:
            yield row
            place = next(wanted, None)
