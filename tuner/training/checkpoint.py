"""Checkpoints: complete, atomic, hashed, written in the background.

A checkpoint is a folder `step_000120` with `trained.safetensors` (trained weights), `optimizer.safetensors`,
`random.safetensors` and `state.json` (counters, the parts of the optimizer and generators that are no tensors, and a
hash of everything in the folder). Where processes hold weights together, each writes its rows, to files of its own:
`trained-00002-of-00008.safetensors`.
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tuner.errors import UserError
from tuner.models.atomic_folder import publish, removed_on_error, sync, unfinished_folder
from tuner.training.checkpoint_names import STATE, checkpoint_steps, step_of
from tuner.training.seal import BrokenSealError, file_hash, seal, sealed_values
from tuner.training.snapshot import SavedRun, Snapshot

if TYPE_CHECKING:  # which loads accelerate
    from tuner.training.devices import Devices

Loaded = TypeVar("Loaded")


class DamagedCheckpointError(UserError):
    """A checkpoint is not as it was written."""


@dataclass(frozen=True)
class _Unfinished:
    """A checkpoint that is being written."""

    step: int
    state: dict[str, Any]
    protected: set[int]


class Checkpoints:
    """The checkpoints of a run folder, written in the background, one at a time.

    All processes make the same calls. The main one writes, or where they hold weights together each writes its part.
    Its thread asks no other process: `settle` and `wait` tell the others that a part is written, and after the last the
    main process completes the checkpoint. Old ones are removed only after a new one is complete.
    """

    def __init__(
        self, folder: Path, keep: int, devices: Devices | None = None, *, together: bool = False
    ) -> None:
        """devices: the run's processes; None: this one is alone. together: whether they train weights together."""
        self._folder, self._keep, self._devices, self._together = folder, keep, devices, together
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._hashes: Mapping[str, str] = {}
        """Of the files that this process has written for the unfinished checkpoint."""
        self._unfinished: _Unfinished | None = None
        """What the processes write together, until all have written their parts."""

    def tidy(self) -> None:
        """Remove the unfinished folder of a killed writer."""
        if self._is_main:
            for leftover in self._folder.glob(".writing-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return checkpoint_steps(self._folder)

    def path(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}"

    @property
    def writes(self) -> bool:
        """Whether this process saves anything: of those that hold the same, the first does."""
        if not self._together:
            return self._is_main
        assert self._devices is not None
        replicas = self._devices.mesh.replicas
        return replicas is None or replicas.get_local_rank() == 0

    def save(self, step: int, snapshot: Snapshot | None, protected: set[int]) -> None:
        """Write in the background, once the checkpoint before is written. `protected` steps are never removed.

        snapshot: None in a process that saves nothing.
        """
        self.wait()
        unfinished = _Unfinished(step, {} if snapshot is None else snapshot.state, protected)
        self._unfinished = unfinished if self._together else None
        self._hashes = {}
        if snapshot is not None:
            self._start(lambda: self._write(unfinished, snapshot))

    def settle(self) -> None:
        """Complete the checkpoint that the processes write together, if all have written their parts.

        Raises what `wait` does.
        """
        if self._unfinished is not None:
            self._complete(is_done=self._writer is None or not self._writer.is_alive())

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what the last write failed with: UserError for a full disk."""
        self._join()
        if self._unfinished is not None:
            self._complete(is_done=True)
            self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise explain_write(error, self._folder) from error

    def load(self, step: int) -> SavedRun:
        """Raises DamagedCheckpointError where anything in the checkpoint is not as it was written.

        Of its files each process checks some.
        """
        folder, saved, error = self.path(step), None, None
        rank, world = (0, 1) if self._devices is None else (self._devices.rank, self._devices.world)
        try:
            saved = SavedRun(folder, sealed_values(folder, STATE, share=slice(rank, None, world)))
        except Exception as failure:
            error = failure
        faults = [fault for fault in self._gather(None if error is None else _fault(error)) if fault]
        if faults:
            cause = error or BrokenSealError(faults[0])
            raise damaged(folder, cause) from cause
        assert saved is not None
        return saved

    def load_newest(self, skip_damaged: bool) -> tuple[int, SavedRun | None, list[str]]:
        """The newest checkpoint's step and content (0 and None: there is none), and what was set aside to get there.

        See `newest_sound`.
        """
        # the main process says which there are: all then go through the same
        steps = self._gather(self.steps() if self._is_main else [])[0]
        folder, saved, sentences = newest_sound(
            [self.path(step) for step in steps],
            lambda path: self.load(step_of(path)),
            skip_damaged,
            _set_aside if self._is_main else lambda damaged: damaged,
        )
        return (0 if folder is None else step_of(folder)), saved, sentences

    @property
    def _is_main(self) -> bool:
        return self._devices is None or self._devices.is_main

    def _gather(self, item: Any) -> list[Any]:
        return [item] if self._devices is None else self._devices.gather([item])

    def _complete(self, is_done: bool) -> None:
        """Tell the other processes whether this one has written its part, and complete the checkpoint if all have."""
        own = None if not is_done else (self._hashes, None if self._error is None else self._explained())
        outcomes = self._gather(own)
        if None in outcomes:
            return
        unfinished, self._unfinished = self._unfinished, None
        assert unfinished is not None
        if errors := [error for _, error in outcomes if error is not None]:
            if self._is_main:
                shutil.rmtree(unfinished_folder(self.path(unfinished.step)), ignore_errors=True)
            raise (
                explain_write(self._error, self._folder) if self._error is not None else UserError(errors[0])
            )
        if self._is_main:
            hashes = {name: value for written, _ in outcomes for name, value in written.items()}
            self._join()
            self._start(lambda: self._finish(unfinished, hashes))

    def _explained(self) -> str:
        assert self._error is not None
        return str(explain_write(self._error, self._folder))

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # handed to the training thread by `wait`
                self._error = error

        # no daemon: the interpreter would end with the last checkpoint half-written
        self._writer = threading.Thread(target=run, daemon=False)
        self._writer.start()

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write(self, unfinished: _Unfinished, snapshot: Snapshot) -> None:
        """Write this process's part, and where it writes alone complete the checkpoint."""
        folder = unfinished_folder(self.path(unfinished.step))
        # not while others may still write theirs
        with nullcontext() if self._together else removed_on_error(folder):
            # by itself, so that an error names it where it is a file
            self._folder.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=True)
            for name, file in snapshot.files.items():
                file.write(folder / name)
                sync(folder / name)
            self._hashes = {name: file_hash(folder / name) for name in snapshot.files}
            if not self._together:
                self._finish(unfinished, self._hashes)

    def _finish(self, unfinished: _Unfinished, hashes: Mapping[str, str]) -> None:
        """Seal the files that were written, give them their name, and remove old checkpoints."""
        folder = unfinished_folder(self.path(unfinished.step))
        with removed_on_error(folder):
            seal(folder, STATE, unfinished.state, hashes)
            sync(folder / STATE)
            publish(folder, self.path(unfinished.step))
        for old in self.steps()[: -self._keep]:
            if old not in unfinished.protected:
                shutil.rmtree(self.path(old))


def newest_sound(
    checkpoints: Sequence[Path],
    load: Callable[[Path], Loaded],
    skip_damaged: bool,
    set_aside: Callable[[Path], Path] | None = None,
) -> tuple[Path | None, Loaded | None, list[str]]:
    """The newest checkpoint that is as it was written, what `load` makes of it, and sentences on those set aside.

    checkpoints: oldest first. load: raises DamagedCheckpointError, which is raised on; with `skip_damaged` the damaged
    checkpoint is renamed instead, so that it is neither used nor lost. set_aside: renames it, and returns its new path.
    """
    sentences: list[str] = []
    for folder in reversed(checkpoints):
        try:
            return folder, load(folder), sentences
        except DamagedCheckpointError as error:
            if not skip_damaged:
                raise
            sentences.append(
                f"{(set_aside or _set_aside)(folder)}: set aside as checkpoint.skip_damaged says ({error.__cause__})"
            )
    if sentences:
        sentences.append("no sound checkpoint is left: the run begins again at its first step")
    return None, None, sentences


def damaged(folder: Path, error: Exception) -> DamagedCheckpointError:
    """The error for a checkpoint that is not as it was written, with what the user can do."""
    return DamagedCheckpointError(
        f"{folder}: this checkpoint is damaged ({_fault(error)}), and is not used; to set it aside and go on from the "
        "one before, add checkpoint.skip_damaged=true"
    )


def _fault(error: Exception) -> str:
    return str(error) if isinstance(error, BrokenSealError) else f"it cannot be read: {error}"


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that nothing takes it for one; returns its new path."""
    number, place = 1, folder.with_name(f"damaged-{folder.name}")
    while place.exists():
        number += 1
        place = folder.with_name(f"damaged-{folder.name}-{number}")
    return folder.rename(place)


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
