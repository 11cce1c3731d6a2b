"""Checkpoints of weights that several processes hold together, saved in one layout and resumed in any other."""

from pathlib import Path

import pytest
import torch

from tuner.config import AdamW
from tuner.errors import UserError
from tuner.training.checkpoint import Checkpoints
from tuner.training.optimizers import make_optimizer
from tuner.training.parts import Part, Rows, parts_of
from tuner.training.snapshot import Snapshot, generator_state, restore, snapshot

SHAPES = {"matrix": (7, 4), "vector": (5,), "head": (1, 4), "adapter": (3, 2)}
"""Of the rows, no number of processes divides all; the last weight is held whole by each."""


def whole_weights(shapes) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()
    }


def parts_in(weights: dict[str, torch.nn.Parameter], rank: int, count: int) -> dict[str, Part]:
    """What one of `count` processes holds of the weights, in tensors of its own, as FSDP cuts them."""
    parts = {}
    for name, weight in weights.items():
        if count == 1 or name == "adapter":
            parts |= parts_of({name: torch.nn.Parameter(weight.detach().clone())})
            continue
        chunk = -(-len(weight) // count)
        first = min(rank * chunk, len(weight))
        rows = Rows(first, min(first + chunk, len(weight)))
        parts[name] = Part(weight, torch.nn.Parameter(weight.detach()[rows.first : rows.end].clone()), rows)
    return parts


def optimizer_of(parts: dict[str, Part], bits=32):
    return make_optimizer(AdamW(lr=0.1, bits=bits), {name: part.own for name, part in parts.items()})


def step(parts: dict[str, Part], optimizer, number: int) -> None:
    """An update whose gradients are a function of the place in the whole weight."""
    for part in parts.values():
        gradient = torch.arange(part.weight.numel()).view(part.weight.shape).float().sin() * (number + 1)
        rows = part.rows or Rows(0, len(part.weight))
        part.own.grad = gradient[rows.first : rows.end] if part.own.numel() else None
    optimizer.step()


def save(folder: Path, count: int, shapes=SHAPES, bits=32) -> Checkpoints:
    """A checkpoint of two updates, as `count` processes write it."""
    weights = whole_weights(shapes)
    saved = []
    for rank in range(count):
        parts = parts_in(weights, rank, count)
        optimizer = optimizer_of(parts, bits)
        for number in range(2):
            step(parts, optimizer, number)
        saved.append(snapshot(parts, optimizer, [generator_state()], {}, number=rank + 1, count=count))
    checkpoints = Checkpoints(folder, keep=1)
    files = {name: file for of_rank in saved for name, file in of_rank.files.items()}
    checkpoints.save(2, Snapshot(files, saved[0].state), set())
    checkpoints.wait()
    return checkpoints


@pytest.mark.parametrize("saved_by", [1, 2, 3])
@pytest.mark.parametrize("resumed_by", [1, 2, 4])
def test_a_run_goes_on_in_any_layout(tmp_path, saved_by, resumed_by):
    checkpoints = save(tmp_path, saved_by)
    weights = whole_weights(SHAPES)
    expected = parts_in(weights, 0, 1)
    optimizer = optimizer_of(expected)
    for number in range(3):
        step(expected, optimizer, number)
    for rank in range(resumed_by):
        parts = parts_in(whole_weights(SHAPES), rank, resumed_by)
        optimizer = optimizer_of(parts)
        restore(checkpoints.load(2), parts, optimizer, rank=0)
        step(parts, optimizer, 2)
        for name, part in parts.items():
            rows = part.rows or Rows(0, len(part.weight))
            assert torch.equal(part.own, expected[name].own[rows.first : rows.end])


def test_eight_bit_state_goes_on_as_it_was_divided_and_otherwise_is_refused(tmp_path):
    """Its scales are of blocks of a process's rows."""
    shapes = {"matrix": (96, 128)}
    checkpoints = save(tmp_path, 2, shapes, bits=8)
    for count, is_same in ((2, True), (1, False), (3, False)):
        parts = parts_in(whole_weights(shapes), 0, count)
        optimizer = optimizer_of(parts, bits=8)
        if is_same:
            restore(checkpoints.load(2), parts, optimizer, rank=0)
            continue
        with pytest.raises(UserError, match=r"in 8 bits, .* parallel\.shard that it was saved with"):
            restore(checkpoints.load(2), parts, optimizer, rank=0)


def test_a_process_reads_its_rows_alone(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 2, {"matrix": (8, 4)})
    read = []
    monkeypatch.setattr(
        "tuner.training.snapshot._File.read_rows",
        lambda self, name, first, end: read.append((name, end - first)) or torch.zeros(end - first, 4),
    )
    parts = parts_in(whole_weights({"matrix": (8, 4)}), 0, 4)
    restore(checkpoints.load(2), parts, optimizer_of(parts), rank=0)
    assert sorted(read) == [("matrix", 2), ("state.0.exp_avg", 2), ("state.0.exp_avg_sq", 2)]
