"""Answers on disk: what an engine with noise of its own has answered once is never answered otherwise."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tuner.models.generate import Answer

_STEP = re.compile(r"step_(\d+)\.safetensors")


def step_name(step: int) -> str:
    """Name of the rollout of a step (0-based)."""
    return f"step_{step:06d}"


class StoredAnswers:
    """A folder with a file of answers for each rollout; a file with its final name is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, request: str) -> list[Answer] | None:
        """The answers stored under a name; None where there are none, or to another request, or the file is damaged.

        request: what tells one request from another, as it was written.
        """
        try:
            opened: Any = safe_open(self._file(name), framework="numpy")
            with opened as file:
                metadata: dict[str, str] | None = file.metadata()
                values: dict[str, np.ndarray] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        # safetensors has no checksum: a flipped bit would be another token, and trained on
        if metadata != {"request": request, "sha256": _hash(values)}:
            return None
        return [
            Answer(
                values["tokens"][start:end],
                bool(values["ended"][index]),
                values["logprobs"][start:end],
                int(values["cut"][index]),
            )
            for index, (start, end) in enumerate(itertools.pairwise(values["offsets"].tolist()))
        ]

    def write(self, name: str, request: str, answers: Sequence[Answer]) -> None:
        """Store answers, whole or not at all, on the disk before this returns."""
        values = {
            "tokens": np.concatenate([answer.tokens for answer in answers]),
            "logprobs": np.concatenate([answer.logprobs for answer in answers]),
            "offsets": np.cumsum([0, *(len(answer.tokens) for answer in answers)], dtype=np.int64),
            "ended": np.array([answer.ended for answer in answers], dtype=np.uint8),
            "cut": np.array([answer.cut for answer in answers], dtype=np.int64),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(name)
        unfinished = file.with_name(f".writing-{file.name}")
        with unfinished.open("wb") as stream:
            stream.write(save(values, {"request": request, "sha256": _hash(values)}))
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)

    def forget_before(self, step: int) -> None:
        """Remove the rollouts of steps before this one: no checkpoint leads back to them."""
        for file in self.folder.glob("step_*.safetensors"):
            match = _STEP.fullmatch(file.name)
            if match and int(match[1]) < step:
                file.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _hash(values: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(f"{name} {values[name].dtype} {values[name].shape} ".encode())
        digest.update(values[name].tobytes())
    return digest.hexdigest()
