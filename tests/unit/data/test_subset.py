"""A few rows of a set: of every source and condition, in proportion."""

from dataclasses import dataclass

import numpy as np
import pytest

from tuner.data.subset import stratified_indices, stratified_subset


@dataclass
class Rows:
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, places: np.ndarray) -> "Rows":
        return Rows(self.sources[places])


@dataclass
class ConditionedRows(Rows):
    conditions: np.ndarray


def test_sources_in_file_order_all_have_their_share():
    rows = Rows(np.repeat([0, 1, 2], [60, 30, 10]))
    assert np.bincount(stratified_subset(rows, 20).sources).tolist() == [12, 6, 2]
    assert np.bincount(stratified_subset(rows, 3).sources).tolist() == [1, 1, 1]


def test_of_each_the_first_rows_in_their_order():
    assert stratified_indices(Rows(np.array([0, 0, 0, 0, 1, 1, 1, 1])), 4).tolist() == [0, 1, 4, 5]
    assert stratified_indices(Rows(np.zeros(9, dtype=np.int32)), 4).tolist() == [0, 1, 2, 3]


def test_conditions_within_a_source_as_well():
    rows = ConditionedRows(np.zeros(8, dtype=np.int32), np.array([2, 2, 2, 2, -1, -1, 0, 0], dtype=np.int32))
    assert stratified_indices(rows, 4).tolist() == [0, 1, 4, 6]


@pytest.mark.parametrize("limit", [None, 5, 6])
def test_a_limit_that_is_none_or_out_of_reach_leaves_all(limit):
    rows = Rows(np.arange(5))
    assert stratified_subset(rows, limit) is rows  # and no copy of them
    assert stratified_indices(rows, limit).tolist() == [0, 1, 2, 3, 4]
    assert stratified_subset(None, limit) is None


def test_every_row_comes_once_whatever_the_limit():
    sources = np.random.default_rng(0).integers(0, 4, 50)
    for limit in range(1, 51):
        places = stratified_indices(Rows(sources), limit)
        assert len(places) == limit
        assert (np.diff(places) > 0).all()
