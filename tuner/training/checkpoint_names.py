"""The names of checkpoints: `step_000120`, or TRL's `checkpoint-120`. Apart from what is in them, so that looking at a
run needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

TRAINED = "trained.safetensors"
"""The file of a checkpoint that holds the trained weights, in either format."""
STATE = "state.json"
"""The file of a checkpoint that is written last, with the hashes of the others."""
CHECKSUMS = "checksums.json"
"""The same in a checkpoint of TRL's format."""

_OURS, _TRL = re.compile(r"step_\d{6,}"), re.compile(r"checkpoint-\d+")


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first; whatever else stands there is left alone."""
    paths = (path for path in folder.glob("step_*") if _OURS.fullmatch(path.name))
    return sorted(step_of(path) for path in paths if path.is_dir())


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of either format in a folder, oldest first; those of TRL's that a kill left unfinished, too."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(filter(is_checkpoint, paths), key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return bool(_OURS.fullmatch(path.name) or _TRL.fullmatch(path.name)) and path.is_dir()


def seal_of(checkpoint: Path) -> Path:
    """The file with the hashes of a checkpoint's files."""
    return checkpoint / (CHECKSUMS if _TRL.fullmatch(checkpoint.name) else STATE)


def step_of(checkpoint: Path) -> int:
    """The number of steps taken before a checkpoint."""
    return int(re.split("[_-]", checkpoint.name)[-1])
