"""A few rows of a set, as mixed as the set is."""

from typing import Any

import numpy as np


def stratified_subset(rows: Any, limit: int | None) -> Any:
    """At most so many samples, prompts or comparisons of a set: those that `stratified_indices` chooses; None of None."""
    if rows is None or limit is None or len(rows) <= limit:
        return rows  # to take is to copy
    return rows.take(stratified_indices(rows, limit))


def stratified_indices(rows: Any, limit: int | None) -> np.ndarray:
    """Which rows, int64, ascending: of every source and condition the first ones, in proportion; None: all.

    Not the first of all: a set is in the order of its files, and those would be of one source.
    """
    if limit is None or len(rows) <= limit:
        return np.arange(len(rows))
    kinds = [rows.sources, getattr(rows, "conditions", np.zeros_like(rows.sources))]
    _, kind_N, sizes = np.unique(np.stack(kinds), axis=1, return_inverse=True, return_counts=True)
    kind_N = kind_N.reshape(-1)  # numpy 2.0 alone gives it another shape
    order_N = np.argsort(kind_N, kind="stable")
    place_N = np.empty(len(rows))  # among the rows of its kind
    place_N[order_N] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(np.argsort(place_N / sizes[kind_N], kind="stable")[:limit])
