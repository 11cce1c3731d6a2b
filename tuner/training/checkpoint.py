"""Checkpoints: complete, atomic, written in the background. No pickles: tensors and JSON.

A checkpoint is a folder `step_000120` with `trained.safetensors` (trained weights), `optimizer.safetensors`,
`random.safetensors` and `state.json` (counters, the parts of the optimizer and generators that are no tensors, and a
hash of everything in the folder).
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tuner.errors import UserError
from tuner.training.checkpoint_names import STATE, checkpoint_steps, step_of
from tuner.training.seal import BrokenSealError, seal, sealed_values

Loaded = TypeVar("Loaded")


class DamagedCheckpointError(UserError):
    """A checkpoint is not as it was written."""


@dataclass(frozen=True)
class Snapshot:
    """All that a run needs to resume bit for bit, in host memory."""

    trained: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    random: dict[str, torch.Tensor]
    """Generator states by rank and library."""
    state: dict[str, Any]
    """JSON: `counters`, and the parts of optimizer and generator states that are no tensors."""


class Checkpoints:
    """The checkpoints of a run folder, written in the background, one at a time.

    Old ones are removed only after a new one is complete.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def tidy(self) -> None:
        """Remove the unfinished folder of a killed writer."""
        for leftover in self._folder.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return checkpoint_steps(self._folder)

    def path(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}"

    def save(self, step: int, snapshot: Snapshot, protected: set[int]) -> None:
        """Write in the background, once the checkpoint before is written. `protected` steps are never removed."""
        self.wait()
        # no daemon: the interpreter would end with the last checkpoint half-written
        self._writer = threading.Thread(target=self._write, args=(step, snapshot, protected), daemon=False)
        self._writer.start()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what the last write failed with: UserError for a full disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise explain_write(error, self._folder) from error

    def load(self, step: int) -> Snapshot:
        """Raises DamagedCheckpointError where anything in the checkpoint is not as it was written."""
        folder = self.path(step)
        try:
            state = sealed_values(folder, STATE)
            trained, optimizer, generators = (
                load_file(folder / f"{name}.safetensors") for name in ("trained", "optimizer", "random")
            )
            return Snapshot(trained, optimizer, generators, state)
        except Exception as error:
            raise damaged(folder, error) from error

    def load_newest(self, skip_damaged: bool) -> tuple[int, Snapshot | None, list[str]]:
        """The newest checkpoint's step and content (0 and None: there is none), and what was set aside to get there.

        See `newest_sound`.
        """
        paths = [self.path(step) for step in self.steps()]
        folder, saved, sentences = newest_sound(paths, lambda path: self.load(step_of(path)), skip_damaged)
        return (0 if folder is None else step_of(folder)), saved, sentences

    def _write(self, step: int, snapshot: Snapshot, protected: set[int]) -> None:
        try:
            write_atomically(self.path(step), lambda folder: _write_snapshot(folder, snapshot))
            for old in self.steps()[: -self._keep]:
                if old not in protected:
                    shutil.rmtree(self.path(old))
        except BaseException as error:  # handed to the training thread by `wait`
            self._error = error


def newest_sound(
    checkpoints: Sequence[Path], load: Callable[[Path], Loaded], skip_damaged: bool
) -> tuple[Path | None, Loaded | None, list[str]]:
    """The newest checkpoint that is as it was written, what `load` makes of it, and sentences on those set aside.

    checkpoints: oldest first. load: raises DamagedCheckpointError, which is raised on; with `skip_damaged` the damaged
    checkpoint is renamed instead, so that it is neither used nor lost.
    """
    sentences: list[str] = []
    for folder in reversed(checkpoints):
        try:
            return folder, load(folder), sentences
        except DamagedCheckpointError as error:
            if not skip_damaged:
                raise
            sentences.append(
                f"{_set_aside(folder)}: set aside as checkpoint.skip_damaged says ({error.__cause__})"
            )
    if sentences:
        sentences.append("no sound checkpoint is left: the run begins again at its first step")
    return None, None, sentences


def damaged(folder: Path, error: Exception) -> DamagedCheckpointError:
    """The error for a checkpoint that is not as it was written, with what the user can do."""
    detail = str(error) if isinstance(error, BrokenSealError) else f"it cannot be read: {error}"
    return DamagedCheckpointError(
        f"{folder}: this checkpoint is damaged ({detail}), and is not used; to set it aside and go on from the one "
        "before, add checkpoint.skip_damaged=true"
    )


def write_atomically(destination: Path, write: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all: under another name, synced to disk, then renamed.

    A rename is atomic, so that a folder with its final name is complete, whenever the process is killed. Without the
    syncs a power failure could leave the new name on disk and its files empty.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = destination.with_name(f".writing-{destination.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        write(unfinished)
        for path in [*unfinished.rglob("*"), unfinished]:
            _sync(path)
        # a rename does not replace a folder that holds files
        if destination.exists():
            shutil.rmtree(destination)
        unfinished.rename(destination)
        _sync(destination.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def snapshot(
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    generators: list[dict[str, Any]],
    counters: dict[str, Any],
) -> Snapshot:
    """Copy the state of a run to host memory. generators: `generator_state()` of every rank."""
    tensors, rest = _split_tensors(optimizer.state_dict())
    random_tensors, random_rest = _split_tensors({str(rank): state for rank, state in enumerate(generators)})
    return Snapshot(
        trained={name: _to_host(parameter) for name, parameter in trained.items()},
        optimizer={name: _to_host(tensor) for name, tensor in tensors.items()},
        random={name: _to_host(tensor) for name, tensor in random_tensors.items()},
        state={"counters": counters, "optimizer": rest, "random": random_rest, "trained": list(trained)},
    )


def restore(
    saved: Snapshot, trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, rank: int
) -> dict[str, Any]:
    """Load a snapshot into a run; returns its counters. Raises UserError when it is of another model."""
    # the order too: an optimizer's state_dict numbers its weights
    if saved.state["trained"] != list(trained):
        raise UserError("this checkpoint trains other weights than the config does: was the model replaced?")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved.trained[name])
    optimizer.load_state_dict(_join_tensors(saved.optimizer, saved.state["optimizer"]))
    generators = _join_tensors(saved.random, saved.state["random"])
    if str(rank) in generators:
        set_generator_state(generators[str(rank)])
    return saved.state["counters"]


def generator_state() -> dict[str, Any]:
    """State of every random generator of this process, as nested dicts and lists."""
    _, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {
            "keys": torch.from_numpy(np.asarray(numpy_keys).astype(np.int64)),
            "rest": numpy_rest,
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_generator_state(state: dict[str, Any]) -> None:
    """Restore what `generator_state` returned, also after JSON has turned its tuples into lists."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, rest = state["numpy"]["keys"], state["numpy"]["rest"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _write_snapshot(folder: Path, saved: Snapshot) -> None:
    for name in ("trained", "optimizer", "random"):
        save_file(getattr(saved, name), folder / f"{name}.safetensors")
    seal(folder, STATE, saved.state)


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that nothing takes it for one; returns its new path."""
    number, place = 1, folder.with_name(f"damaged-{folder.name}")
    while place.exists():
        number += 1
        place = folder.with_name(f"damaged-{folder.name}-{number}")
    return folder.rename(place)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    # copy=True: on CPU `to` returns the same memory, and training would go on inside the snapshot;
    # contiguous, as safetensors writes nothing else
    return tensor.detach().to("cpu", copy=True).contiguous()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _split_tensors(tree: Any, prefix: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Nested dicts and lists as (tensors by path, the same tree with {"tensor": path} in their place).

    Dicts become {"keys": [...], "values": [...]}: JSON has no integer keys.
    """
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}, {"tensor": prefix}
    if not isinstance(tree, dict | list | tuple):
        return {}, tree
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    tensors: dict[str, torch.Tensor] = {}
    values = []
    for key in keys:
        below, rest = _split_tensors(tree[key], f"{prefix}.{key}" if prefix else str(key))
        tensors |= below
        values.append(rest)
    return tensors, {"keys": list(keys), "values": values} if isinstance(tree, dict) else values


def _join_tensors(tensors: dict[str, torch.Tensor], tree: Any) -> Any:
    if isinstance(tree, list):
        return [_join_tensors(tensors, item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    values = (_join_tensors(tensors, value) for value in tree["values"])
    return dict(zip(tree["keys"], values, strict=True))


_PLACES = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EIO,
)
"""What is wrong with a place: it may not be written, is gone, or is a file where a folder is needed, or the reverse."""


def explain_write(error: BaseException, folder: Path) -> BaseException:
    """A UserError for a full disk, and for a place in the folder that cannot be written; any other error as it is."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors reports a full disk as an error of its own, without errno
    if full or "No space left" in str(error):
        return UserError(
            f"{folder}: the disk is full; free some space and run the same command again to go on"
        )
    if isinstance(error, OSError) and error.errno in _PLACES and _is_inside(error.filename, folder):
        return UserError(
            f"{error.filename}: cannot be read or written ({error.strerror}); put it right, or move it away, and run "
            "the same command again to go on"
        )
    return error


def _is_inside(path: object, folder: Path) -> bool:
    return isinstance(path, str | Path) and Path(path).absolute().is_relative_to(folder.absolute())
