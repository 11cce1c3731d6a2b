"""Conditions: the system prompts that tell one reward model which preference is asked for.

A file of wordings holds one a line; empty lines and those that begin with "# " are notes, but for the lines
"# unseen" and "# novel", below which stand wordings that are never trained: of the same key words in new sentences,
and without a word in common. The report card asks in these to see what was understood.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from tuner.data.conversation import Turn
from tuner.data.split import hash_of, said_by
from tuner.errors import UserError
from tuner.resources import PREFIX, conditions_folder, locate

Asked = Literal["seen", "unseen", "novel", "blank", "swapped"]
"""How a row is asked about: in a trained wording, in another, without its condition, or under another condition."""
CONTROLS: tuple[Asked, ...] = get_args(Asked)[1:]


@dataclass(frozen=True)
class Wordings:
    """The ways a condition is put to the model."""

    seen: tuple[str, ...]
    """Trained on."""
    unseen: tuple[str, ...] = ()
    novel: tuple[str, ...] = ()

    def of(self, asked: Asked) -> tuple[str, ...]:
        return {"unseen": self.unseen, "novel": self.novel}.get(asked, self.seen)


@dataclass(frozen=True)
class Conditions:
    """The wordings of every condition, and which of them a prompt gets: by the seed and what it says alone."""

    wordings: Mapping[str, Wordings]
    seed: int = 0
    asked: Asked = "seen"
    partners: Mapping[str, str] = field(default_factory=dict)
    """Condition -> the one that is put in its place where `asked` is "swapped"."""

    def prompt(self, name: str | None, key: bytes, origin: str) -> str | None:
        """The system prompt of a row with this `drawing_key`; None where it has no condition.

        Raises UserError naming the row when the condition is unknown, and when it has no such wordings.
        """
        if name is not None and name not in self.wordings:
            known = ", ".join(self.wordings) or "none"
            raise UserError(
                f"{origin}: condition {name!r} is not in the config, which has: {known}; add it there"
            )
        if name is None or self.asked == "blank":
            return None
        asked = self.partners.get(name, "") if self.asked == "swapped" else name
        texts = self.wordings[asked].of(self.asked) if asked in self.wordings else ()
        if not texts:
            raise UserError(f"{origin}: condition {name!r} cannot be asked about in the way {self.asked!r}")
        drawn = hashlib.blake2b(key, digest_size=8, key=self.seed.to_bytes(16, "big")).digest()
        return texts[int.from_bytes(drawn, "big") % len(texts)]


def drawing_key(prompt: Sequence[Turn]) -> bytes:
    """What decides the wording: the prompt, so that all answers to it are asked about in the same words."""
    return hash_of(said_by(prompt))


def read_conditions(given: Mapping[str, str | tuple[str, ...]]) -> dict[str, Wordings]:
    """The wordings of a config's conditions: texts, tuples of texts, and files of wordings."""
    return {name: _read(name, value) for name, value in given.items()}


def _read(name: str, value: str | tuple[str, ...]) -> Wordings:
    sections: dict[str, list[str]] = {"seen": [], "unseen": [], "novel": []}
    for one in (value,) if isinstance(value, str) else value:
        if not one.startswith(PREFIX) and not one.endswith(".txt"):
            sections["seen"].append(one)
            continue
        for file in _files(name, one):
            section = "seen"
            for line in map(str.strip, _lines(name, file)):
                if line in ("# unseen", "# novel"):
                    section = line.removeprefix("# ")
                elif line and not f"{line} ".startswith("# "):
                    sections[section].append(line)
    wordings = Wordings(*map(tuple, sections.values()))
    if not wordings.seen:
        raise UserError(f"conditions.{name}: {value} holds no wording to train on; write one a line")
    return wordings


def _files(name: str, value: str) -> list[Path]:
    if value.endswith(".txt"):
        return [Path(locate(value)).expanduser()]
    stem = value.removeprefix(PREFIX)
    files = sorted(conditions_folder().glob("*.txt"))
    found = [file for file in files if stem in (file.stem, file.stem.rpartition(".")[0])]
    if not found:
        known = ", ".join(dict.fromkeys(file.stem.rpartition(".")[0] for file in files))
        raise UserError(f"conditions.{name}: {value!r} does not come with tuner, which has: {known}")
    return found


def _lines(name: str, file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"conditions.{name}: {file} cannot be read ({error}); name a UTF-8 text file"
        ) from error
