"""Folders that are complete where they have their names, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(destination: Path, write: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all: under another name, synced to disk, then renamed.

    A rename is atomic, so that a folder with its final name is complete, whenever the process is killed. Without the
    syncs a power failure could leave the new name on disk and its files empty.
    """
    with _whole(destination) as unfinished:
        write(unfinished)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Where to write a folder that nothing stands in yet: whole or not at all, as `write_atomically`.

    One that is there and empty is the user's own, perhaps where a disk is mounted: no other can take its name, and it
    is written in its place.
    """
    with removed_on_error(output) if output.is_dir() else _whole(output) as unfinished:
        yield unfinished or output


@contextmanager
def _whole(destination: Path) -> Iterator[Path]:
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_folder(destination)
    shutil.rmtree(unfinished, ignore_errors=True)
    with removed_on_error(unfinished):
        unfinished.mkdir()
        yield unfinished
        for path in unfinished.rglob("*"):
            sync(path)
        publish(unfinished, destination)


def unfinished_folder(destination: Path) -> Path:
    """Where a folder stands until it is complete."""
    return destination.with_name(f".writing-{destination.name}")


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove a folder where the block fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def publish(unfinished: Path, destination: Path) -> None:
    """Give a complete folder, whose files are on disk, its name."""
    sync(unfinished)
    # a rename does not replace a folder that holds files
    if destination.exists():
        shutil.rmtree(destination)
    unfinished.rename(destination)
    sync(destination.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
