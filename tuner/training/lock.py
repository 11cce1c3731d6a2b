"""The lock of a run folder: one process writes it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from tuner.errors import UserError


class FolderLock:
    """A file `.lock`, locked while a process trains in the folder; the system unlocks it when the process dies."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock. Raises UserError, with the other's process number, when another process has it."""
        # not "w", which would erase the other process's number before the lock is known to be free
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{self._path.parent}: process {file.read().strip() or 'unknown'} is training here; "
                "wait for it, or give this run another name=..."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file

    @property
    def is_held(self) -> bool:
        """Whether another process has the lock."""
        try:
            self.acquire()
        except UserError:
            return True
        self.release()
        return False

    def release(self) -> None:
        """Give the lock back, where this process has it."""
        if self._file is not None:
            self._file.close()
            self._file = None
