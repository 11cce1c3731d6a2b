"""What a foreign config says, in the terms that all trainers share; each importer fills one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tuner.importers.keys import Keys
from tuner.importers.part import Part
from tuner.importers.report import Report

Stage = Literal["sft", "text", "dpo", "kto", "reward", "ppo"]


@dataclass(frozen=True)
class Batch:
    """The batch of an optimizer step, as other trainers count it."""

    rows: int
    """Rows (packs, pairs) in one forward pass of one device."""
    accumulation: int
    """Forward passes per optimizer step and device."""
    devices: int
    """Devices that take different rows."""
    pack: int | None = None
    """Tokens of a pack; None: rows are padded, and a batch has so many rows whatever their lengths."""
    words: str = ""
    """The same in the other trainer's words, for the comment."""

    @property
    def total(self) -> int:
        """Rows (packs, pairs) per optimizer step, over all devices."""
        return self.rows * self.accumulation * self.devices


@dataclass
class Recipe:
    """A training run in terms that all trainers share. Fields are in tuner's names and units."""

    tool: str
    file: str
    report: Report
    stage: Stage = "sft"
    model: Part = field(default_factory=lambda: Part("Model"))
    adapter: Part | None = None
    freeze: Part | None = None
    files: list[Part] = field(default_factory=list[Part])
    validation_files: list[Part] = field(default_factory=list[Part])
    functions: dict[str, str] = field(default_factory=dict[str, str])
    """Name -> source of the functions that convert rows."""
    templates: dict[str, str] = field(default_factory=dict[str, str])
    """File name -> text of the chat templates that belong to the config."""
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further fields of `data`: template, system, learn, max_length, ..."""
    batch: Batch = Batch(1, 1, 1)
    optimizer: Part = field(default_factory=lambda: Part("AdamW"))
    schedule: Part = field(default_factory=lambda: Part("Cosine"))
    checkpoint: Part = field(default_factory=lambda: Part("Checkpoint"))
    evaluation: Part = field(default_factory=lambda: Part("Validation"))
    training: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further fields of the stage: epochs, max_steps, seed, beta, ..."""
    comments: dict[str, str] = field(default_factory=dict[str, str])
    """Path of a field -> the comment above it."""

    def decide(self, path: str, why: str) -> None:
        """Record how a value was chosen that the other config does not have as such."""
        self.report.decided[path] = why
        self.comments[path] = why

    def offload(self, key: str) -> None:
        """Take over that layers' inputs wait in host memory, as a key says."""
        if self.stage in ("dpo", "kto"):
            self.report.lose(key, "TRL's trainers keep layers' inputs on the device")
        else:
            self.training["gradient_checkpointing"] = "offload"

    def share_rows(self, key: str, devices: int | None) -> int:
        """Take over how many devices compute a row together, as a key says; returns it, 1 where they do not."""
        if devices is None or devices <= 1:
            return 1
        if self.stage in ("dpo", "kto"):
            self.report.lose(key, "TRL's trainers compute rows on one device")
        else:
            self.training["parallel"] = Part("Parallel", sequence=devices)
        return devices

    def read_system(self, keys: Keys, key: str) -> None:
        """The system turn of rows without one, which preferences do not get."""
        text = keys.text(key)
        if text and self.stage in ("dpo", "kto", "reward"):
            keys.lose(key, "preferences bring their own system turns; write it into the rows")
        elif text:
            self.data["system"] = text

    def function_name(self, name: str, source: str) -> str:
        """Add a function to the config file; a name that another function has gets a number."""
        number, unique = 1, name
        while self.functions.get(unique, source) != source:
            number += 1
            unique = f"{name}_{number}"
        self.functions[unique] = source
        return unique


def final_share(share: float | None, lowest: float | None, lr: float | None) -> float:
    """Where a schedule ends, in parts of the learning rate; lowest: the same as a rate. An lr of 0 is refused later."""
    return round(min(1.0, share or ((lowest or 0.0) / lr if lr else 0.0)), 6)
