"""Conditions: the system prompts that tell one reward model which preference to judge by.

A file of wordings has one per line. Empty lines and lines that begin with "# " are comments, except for the lines
"# unseen" and "# novel": the wordings below them are never trained on. Unseen ones use the same key words in new
sentences, novel ones share no word with the trained ones. The report card uses both to measure generalization.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from tuner.data.conversation import Turn
from tuner.data.split import hash_values, plain_turns
from tuner.errors import UserError
from tuner.resources import PREFIX, conditions_folder, locate

Presentation = Literal["seen", "unseen", "novel", "blank", "swapped"]
"""How a row's condition is put to the model: in a trained wording ("seen"), in another ("unseen", "novel"), left out
("blank"), or replaced by another condition ("swapped")."""
CONTROLS: tuple[Presentation, ...] = get_args(Presentation)[1:]


@dataclass(frozen=True)
class Wordings:
    """The texts of one condition."""

    seen: tuple[str, ...]
    """Trained on."""
    unseen: tuple[str, ...] = ()
    novel: tuple[str, ...] = ()

    def texts(self, presentation: Presentation) -> tuple[str, ...]:
        """The wordings to draw from; a swapped condition is put in its trained ones."""
        return {"unseen": self.unseen, "novel": self.novel}.get(presentation, self.seen)


@dataclass(frozen=True)
class Conditions:
    """The wordings of every condition, and the draw of one for a prompt: by the seed and the prompt's content alone."""

    wordings: Mapping[str, Wordings]
    seed: int = 0
    presentation: Presentation = "seen"
    partners: Mapping[str, str] = field(default_factory=dict[str, str])
    """Condition -> the condition that replaces it where `presentation` is "swapped"."""

    def prompt(self, name: str | None, key: bytes, origin: str) -> str | None:
        """The system prompt of a row with this `drawing_key`; None when the row has no condition, or it is left out.

        Raises UserError with the row's origin when the condition is unknown or has no wording for `presentation`.
        """
        if name is not None and name not in self.wordings:
            configured = ", ".join(self.wordings) or "none"
            raise UserError(
                f"{origin}: condition {name!r} is not in the config, which has: {configured}; add it there"
            )
        if name is None or self.presentation == "blank":
            return None
        presented = self.partners.get(name, "") if self.presentation == "swapped" else name
        texts = self.wordings[presented].texts(self.presentation) if presented in self.wordings else ()
        if not texts:
            raise UserError(
                f"{origin}: condition {name!r} has no wording to present as {self.presentation!r}; add one to its file"
            )
        # hashed again under the seed: the key itself decides a row's part (`split.assign_part`), so a draw
        # by it would give train and test rows different wordings
        digest = hashlib.blake2b(key, digest_size=8, key=self.seed.to_bytes(16, "big")).digest()
        return texts[int.from_bytes(digest, "big") % len(texts)]


def drawing_key(prompt: Sequence[Turn]) -> bytes:
    """The key that a wording is drawn by: a hash of the prompt, so that all answers to it are judged in one wording."""
    return hash_values(plain_turns(prompt))


def read_conditions(conditions: Mapping[str, str | tuple[str, ...]]) -> dict[str, Wordings]:
    """The wordings of a config's conditions, each a text, a file of wordings, or a tuple of these.

    Raises UserError when a file is missing or not UTF-8, and when a condition has no wording to train on.
    """
    return {name: _read_wordings(name, value) for name, value in conditions.items()}


def _read_wordings(name: str, value: str | tuple[str, ...]) -> Wordings:
    sections: dict[str, list[str]] = {"seen": [], "unseen": [], "novel": []}
    for entry in (value,) if isinstance(value, str) else value:
        if not entry.startswith(PREFIX) and not entry.endswith(".txt"):
            sections["seen"].append(entry)
            continue
        for file in _files(name, entry):
            section = "seen"
            for line in map(str.strip, _lines(name, file)):
                if line in ("# unseen", "# novel"):
                    section = line.removeprefix("# ")
                # the space makes a bare "#" a comment, and leaves "#1 answer" a wording
                elif line and not f"{line} ".startswith("# "):
                    sections[section].append(line)
    wordings = Wordings(*map(tuple, sections.values()))
    if not wordings.seen:
        raise UserError(f"conditions.{name}: {value} has no wording to train on; write one per line")
    return wordings


def _files(name: str, value: str) -> list[Path]:
    if value.endswith(".txt"):
        return [Path(locate(value)).expanduser()]
    stem = value.removeprefix(PREFIX)
    files = sorted(conditions_folder().glob("*.txt"))
    matches = [file for file in files if stem in (file.stem, file.stem.rpartition(".")[0])]
    if not matches:
        available = ", ".join(dict.fromkeys(file.stem.rpartition(".")[0] for file in files))
        raise UserError(f"conditions.{name}: {value!r} does not come with tuner, which has: {available}")
    return matches


def _lines(name: str, file: Path) -> list[str]:
    try:
        # -sig: a byte order mark would become part of the first wording
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"conditions.{name}: {file} cannot be read ({error}); name a UTF-8 text file"
        ) from error
