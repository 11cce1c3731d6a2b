"""The names of checkpoints: `step_000120`. Apart from what is in them, so that looking at a run needs no torch."""

from __future__ import annotations

import re
from pathlib import Path


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first; whatever else stands there is left alone."""
    paths = (path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name))
    return sorted(step_of(path) for path in paths if path.is_dir())


def step_of(checkpoint: Path) -> int:
    """The number of steps taken before a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))
