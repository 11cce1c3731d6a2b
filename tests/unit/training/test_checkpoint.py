"""Checkpoints: what goes in comes out, to the bit; atomic; old ones removed last."""

import json
import random

import numpy as np
import pytest
import torch

from tuner.errors import UserError
from tuner.training.checkpoint import (
    Checkpoints,
    generator_state,
    restore,
    set_generator_state,
    snapshot,
    write_atomically,
)  # fmt: skip


def small_training(steps=3):
    torch.manual_seed(0)
    trained = {"a": torch.nn.Parameter(torch.randn(3, 4)), "b": torch.nn.Parameter(torch.randn(4))}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=0.1)
    for _ in range(steps):
        (trained["a"].sum() * trained["b"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained, optimizer


def test_save_and_load_are_the_same_to_the_bit(tmp_path):
    trained, optimizer = small_training()
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, snapshot(trained, optimizer, [generator_state()], {"step": 3}), set())
    checkpoints.wait()
    other, fresh = small_training(steps=0)
    assert restore(checkpoints.load(3), other, fresh, rank=0) == {"step": 3}
    for saved, restored in ((trained, other),):
        assert all(torch.equal(saved[name], restored[name]) for name in saved)
    for saved, restored in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(saved[name], restored[name]) for name in saved)
    assert fresh.param_groups[0]["lr"] == 0.1


def test_no_pickles_are_written(tmp_path):
    trained, optimizer = small_training()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, snapshot(trained, optimizer, [generator_state()], {}), set())
    checkpoints.wait()
    names = {path.name for path in (tmp_path / "step_000001").iterdir()}
    assert names == {"trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"}
    json.loads((tmp_path / "step_000001" / "state.json").read_text())


def test_every_generator_goes_on_where_it_was(tmp_path):
    trained, optimizer = small_training()
    checkpoints = Checkpoints(tmp_path, keep=1)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    random.gauss(0, 1), np.random.randn()  # leaves half a pair behind in each
    checkpoints.save(1, snapshot(trained, optimizer, [{}, generator_state()], {}), set())
    drawn = torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn()
    checkpoints.wait()
    torch.manual_seed(9), random.seed(9), np.random.seed(9)
    restore(checkpoints.load(1), trained, optimizer, rank=1)
    assert (torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn()) == drawn


def test_generator_state_survives_a_round_trip_in_memory():
    state = generator_state()
    drawn = torch.rand(2).tolist()
    set_generator_state(state)
    assert torch.rand(2).tolist() == drawn


def test_old_ones_go_and_the_protected_stay(tmp_path):
    trained, optimizer = small_training()
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step, snapshot(trained, optimizer, [], {}), protected={2})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]


def test_a_snapshot_is_a_copy(tmp_path):
    trained, optimizer = small_training()
    saved = snapshot(trained, optimizer, [], {})
    before = saved.trained["a"].clone()
    with torch.no_grad():
        trained["a"].add_(1)
    assert torch.equal(saved.trained["a"], before)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    destination = tmp_path / "model"
    write_atomically(destination, lambda folder: (folder / "a").write_text("old"))

    def broken(folder):
        (folder / "a").write_text("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(destination, broken)
    assert (destination / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_unreadable_checkpoint_says_what_to_do(tmp_path):
    trained, optimizer = small_training()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, snapshot(trained, optimizer, [], {}), set())
    checkpoints.wait()
    (tmp_path / "step_000001" / "trained.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"cannot be read .*; remove the folder to go on from the one before"):
        checkpoints.load(1)


def test_another_models_checkpoint_is_refused():
    trained, optimizer = small_training()
    saved = snapshot(trained, optimizer, [], {})
    with pytest.raises(UserError, match="trains other weights"):
        restore(saved, {"c": trained["a"]}, optimizer, rank=0)
