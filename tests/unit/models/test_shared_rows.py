"""The part of a row that one of several processes computes: every place once, a dead segment behind the last."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tuner.data.batch import make_batch
from tuner.errors import UserError
from tuner.models.shared_rows import RowPart, _padded, refuse_shared_rows


@dataclass
class Processes:
    """A group of processes, seen by one of them."""

    rank: int
    count: int

    def get_local_rank(self) -> int:
        return self.rank

    def size(self) -> int:
        return self.count


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_parts_are_the_row(count):
    generator = np.random.default_rng(0)
    batch = make_batch([
        (generator.integers(1, 100, length).astype(np.int32), np.ones(length, np.float32)) for length in (5, 1, 9, 8)
    ])  # fmt: skip
    row = _padded(batch, count)
    parts = [RowPart(row, Processes(rank, count)) for rank in range(count)]  # type: ignore[arg-type]
    bounds = [part.bounds for part in parts]
    assert [first for first, _ in bounds[1:]] == [end for _, end in bounds[:-1]]
    assert (bounds[0][0], bounds[-1][1]) == (0, len(row.tokens_T))
    assert len({end - first for first, end in bounds}) == 1
    assert torch.equal(row.tokens_T[:23], batch.tokens_T)
    missing = -23 % count
    assert row.borders == (*batch.borders, *([23 + missing] if missing else []))
    assert row.offsets.tolist() == list(row.borders)
    assert row.positions_T[23:].tolist() == list(range(missing))  # a segment of its own
    # each predictor lies in one part, though its target may lie in the next
    places = batch.learned_N - 1
    found = [part.places(places) for part in parts]
    assert [place for own, _ in found for place in range(len(places))[own]] == list(range(len(places)))
    for part, (own, local) in zip(parts, found, strict=True):
        first, end = part.bounds
        assert torch.equal(row.tokens_T[first:end][local], batch.tokens_T[places[own]])


def test_layers_that_scale_by_what_they_read_are_refused():
    """Kinds of layers with positions of their own: those by length are not made exact in a part of a row."""
    kinds = {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}
    model = torch.nn.Module()
    model.config = SimpleNamespace(num_attention_heads=4, rope_parameters=kinds)  # type: ignore[assignment]
    loaded = SimpleNamespace(transformer=model, base=SimpleNamespace(path="org/model"))
    with pytest.raises(
        UserError, match=r"org/model has layers that scale positions by .*leave parallel.sequence out"
    ):
        refuse_shared_rows(loaded, 2)  # type: ignore[arg-type]
    kinds["full_attention"]["rope_type"] = "linear"
    refuse_shared_rows(loaded, 2)  # type: ignore[arg-type]
