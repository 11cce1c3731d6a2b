"""Checkpoints: what goes in comes out, to the bit; atomic; old ones removed last."""

import json
import random

import numpy as np
import pytest
import torch

from tuner.errors import UserError
from tuner.models.atomic_folder import write_atomically
from tuner.training.checkpoint import Checkpoints
from tuner.training.parts import parts_of
from tuner.training.snapshot import generator_state, restore, set_generator_state, snapshot


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
    checkpoints.save(3, snapshot(parts_of(trained), optimizer, [generator_state()], {"step": 3}), set())
    checkpoints.wait()
    other, fresh = small_training(steps=0)
    assert restore(checkpoints.load(3), parts_of(other), fresh, rank=0) == {"step": 3}
    for saved, restored in ((trained, other),):
        assert all(torch.equal(saved[name], restored[name]) for name in saved)
    for saved, restored in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(saved[name], restored[name]) for name in saved)
    assert fresh.param_groups[0]["lr"] == 0.1


def test_no_pickles_are_written(tmp_path):
    trained, optimizer = small_training()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, snapshot(parts_of(trained), optimizer, [generator_state()], {}), set())
    checkpoints.wait()
    names = {path.name for path in (tmp_path / "step_000001").iterdir()}
    assert names == {"trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"}
    json.loads((tmp_path / "step_000001" / "state.json").read_text())


def test_every_generator_goes_on_where_it_was(tmp_path):
    trained, optimizer = small_training()
    checkpoints = Checkpoints(tmp_path, keep=1)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    random.gauss(0, 1), np.random.randn()  # leaves half a pair behind in each
    checkpoints.save(1, snapshot(parts_of(trained), optimizer, [{}, generator_state()], {}), set())
    drawn = torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn()
    checkpoints.wait()
    torch.manual_seed(9), random.seed(9), np.random.seed(9)
    restore(checkpoints.load(1), parts_of(trained), optimizer, rank=1)
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
        checkpoints.save(step, snapshot(parts_of(trained), optimizer, [], {}), protected={2})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]


def test_a_snapshot_is_a_copy(tmp_path):
    trained, optimizer = small_training()
    saved = snapshot(parts_of(trained), optimizer, [], {})
    of_trained = saved.files["trained.safetensors"].tensors
    before = of_trained["a"].clone()
    with torch.no_grad():
        trained["a"].add_(1)
    assert torch.equal(of_trained["a"], before)


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


def two_checkpoints(folder):
    """Checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        trained, optimizer = small_training(step)
        counters = {"step": step, "best_loss": float("inf")}
        checkpoints.save(step, snapshot(parts_of(trained), optimizer, [generator_state()], counters), set())
    checkpoints.wait()
    return checkpoints


def flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit_the_step(path):
    text = path.read_text()
    assert '"step": 2' in text
    path.write_text(text.replace('"step": 2', '"step": 1'))


DAMAGES = {
    "a weight": lambda folder: flip_a_bit(folder / "trained.safetensors", -1),
    "a header": lambda folder: flip_a_bit(folder / "optimizer.safetensors", 12),
    "a generator": lambda folder: flip_a_bit(folder / "random.safetensors", -1),
    "an edited counter": lambda folder: edit_the_step(folder / "state.json"),
    "half a file": lambda folder: (folder / "trained.safetensors").write_bytes(b"half"),
    "no file": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "an empty state": lambda folder: (folder / "state.json").write_text(""),
    "another state": lambda folder: (folder / "state.json").write_text("{}"),
    "a list": lambda folder: (folder / "state.json").write_text("[]"),
    "binary": lambda folder: (folder / "state.json").write_bytes(b"\xff\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_or_set_aside_and_never_used(tmp_path, damage):
    checkpoints = two_checkpoints(tmp_path)
    newest = tmp_path / "step_000002"
    DAMAGES[damage](newest)
    with pytest.raises(
        UserError, match=r"step_000002: this checkpoint is damaged .*checkpoint\.skip_damaged"
    ):
        checkpoints.load_newest(skip_damaged=False)
    assert newest.is_dir()
    step, saved, sentences = checkpoints.load_newest(skip_damaged=True)
    assert saved is not None
    assert (step, saved.state["counters"]["step"]) == (1, 1)
    assert "damaged-step_000002: set aside" in sentences[0]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["damaged-step_000002", "step_000001"]


def test_where_all_are_damaged_the_run_begins_again_and_says_so(tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    for step in (1, 2):
        flip_a_bit(checkpoints.path(step) / "trained.safetensors", -1)
    step, saved, sentences = checkpoints.load_newest(skip_damaged=True)
    assert (step, saved, len(sentences)) == (0, None, 3)
    assert "begins again at its first step" in sentences[-1]


def test_what_is_no_checkpoint_is_none(tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    for name in ("step_abc", "step_000009.bak", "step_9", "damaged-step_000007"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_000008").write_text("a plain file")
    assert checkpoints.steps() == [1, 2]


def test_another_models_checkpoint_is_refused(tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    trained, optimizer = small_training()
    with pytest.raises(UserError, match="trains other weights"):
        restore(checkpoints.load(2), parts_of({"c": trained["a"]}), optimizer, rank=0)
