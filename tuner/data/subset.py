"""A stratified subset: a few rows that mix sources and conditions as the whole set does."""

from collections.abc import Sized
from typing import Protocol, Self, TypeVar, overload

import numpy as np


class Stratified(Sized, Protocol):
    """A set of rows that know their source, such as Examples, Comparisons and PromptSet.

    One with `conditions` (int [N], -1 for none) is stratified by these as well.
    """

    @property
    def sources(self) -> np.ndarray:
        """int [N]: number of each row's source."""
        ...

    def take(self, indices: np.ndarray, /) -> Self: ...


Rows = TypeVar("Rows", bound=Stratified)


@overload
def stratified_subset(rows: Rows, limit: int | None) -> Rows: ...
@overload
def stratified_subset(rows: Rows | None, limit: int | None) -> Rows | None: ...
def stratified_subset(rows: Rows | None, limit: int | None) -> Rows | None:
    """At most `limit` rows of a set, those of `stratified_indices`; the set itself where it is no larger."""
    if rows is None or limit is None or len(rows) <= limit:
        return rows  # take() would copy them
    return rows.take(stratified_indices(rows, limit))


def stratified_indices(rows: Stratified, limit: int | None) -> np.ndarray:
    """int64 [min(N, limit)], ascending: the first rows of every source and condition, in proportion; None: all.

    The first rows of the whole set would not do: rows are in the order of their files, so these would be of one source.
    """
    if limit is None or len(rows) <= limit:
        return np.arange(len(rows))
    keys = [rows.sources, getattr(rows, "conditions", np.zeros_like(rows.sources))]
    _, stratum_N, sizes = np.unique(np.stack(keys), axis=1, return_inverse=True, return_counts=True)
    stratum_N = stratum_N.reshape(-1)  # numpy 2.0 alone returns it with another shape
    order_N = np.argsort(stratum_N, kind="stable")
    place_N = np.empty(len(rows))  # of each row within its stratum
    place_N[order_N] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(np.argsort(place_N / sizes[stratum_N], kind="stable")[:limit])
