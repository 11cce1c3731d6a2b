"""What became of the rows: counts per source and part, in figures and in words."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tuner.data.comparisons import Comparisons
from tuner.data.examples import Examples
from tuner.data.prompts import PromptSet

HISTOGRAM = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Upper bounds (inclusive) of the histogram of lengths; one more bin holds what is longer."""


@dataclass
class SourceReport:
    """Counts of one source. A row is kept or dropped for a reason counted here; a kept one may be split."""

    path: str
    purpose: str
    """`files`, `validation_files` or `test_files`."""
    rows: int = 0
    kept: int = 0
    duplicates: int = 0
    """Rows equal to an earlier one; dropped only with duplicates="drop"."""
    dropped_duplicates: int = 0
    too_long: int = 0
    dropped_too_long: int = 0
    cut: int = 0
    cut_to_nothing: int = 0
    """Cut before anything learned, therefore dropped."""
    split: int = 0
    pieces: int = 0
    """Samples made of the split rows."""
    switched_off: int = 0
    """Rows whose own weight is 0, dropped."""
    ties: int = 0
    """Rows whose answers are all of one rank, dropped where ties are."""
    incomparable: int = 0
    """Rows whose answers are the same or answer different prompts, dropped where the config says so."""
    empty_answers: int = 0
    """Rows with an assistant turn without text: they teach to end at once."""
    longest: int = 0
    """Tokens of the longest sample before any cut."""


@dataclass(frozen=True)
class PartReport:
    """What one part holds."""

    samples: int
    tokens: int
    learned_tokens: int
    learned_weight: float
    """Sum of the weights of the learned tokens."""
    longest: int
    histogram: tuple[int, ...]
    """Samples per bin of HISTOGRAM."""
    pairs: int | None = None
    """Of answers that are compared; each of the samples then is one of the answers."""
    conditions: dict[str, int] = field(default_factory=dict)
    """Rows of each condition; "" for those that have none."""
    prompts: int | None = None
    """Of what is to be answered, and not learned; each of the samples then is one of them."""

    @classmethod
    def of(cls, part: Examples | Comparisons | PromptSet) -> "PartReport":
        if isinstance(part, Comparisons):
            return replace(cls.of(part.sequences), pairs=len(part.better), conditions=_conditions(part))
        if isinstance(part, PromptSet):
            return replace(cls.of(part.examples()), prompts=len(part), conditions=_conditions(part))
        examples, lengths = part, part.lengths
        bins = np.bincount(np.searchsorted(HISTOGRAM, lengths), minlength=len(HISTOGRAM) + 1)
        return cls(
            samples=len(examples),
            tokens=int(lengths.sum()),
            learned_tokens=int(np.count_nonzero(examples.weights_T)),
            learned_weight=float(examples.weights_T.sum(dtype=np.float64)),
            longest=int(lengths.max()),
            histogram=tuple(int(count) for count in bins),
        )

    @property
    def learned_share(self) -> float:
        return self.learned_tokens / self.tokens


@dataclass
class DataReport:
    """What became of the rows of every source, and what the parts hold."""

    sources: list[SourceReport] = field(default_factory=list)
    parts: dict[str, PartReport] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What a user should know, a sentence each."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataReport":
        parts = {
            name: PartReport(**{**part, "histogram": tuple(part["histogram"])})
            for name, part in values["parts"].items()
        }
        return cls([SourceReport(**source) for source in values["sources"]], parts, list(values["notes"]))

    def __str__(self) -> str:
        """One paragraph."""
        said = [f"{_sum(self, 'rows'):,} rows read from {_number(len(self.sources), 'source')}"]
        counts = {
            "equal to an earlier one and kept": _sum(self, "duplicates") - _sum(self, "dropped_duplicates"),
            "equal to an earlier one and dropped": _sum(self, "dropped_duplicates"),
            "too long and dropped": _sum(self, "dropped_too_long"),
            "cut": _sum(self, "cut"),
            "cut before anything learned and dropped": _sum(self, "cut_to_nothing"),
            "tied and dropped": _sum(self, "ties"),
            "incomparable and dropped": _sum(self, "incomparable"),
            "switched off": _sum(self, "switched_off"),
        }
        said += [f"{count:,} {what}" for what, count in counts.items() if count]
        if _sum(self, "split"):
            said.append(f"{_sum(self, 'split'):,} split into {_sum(self, 'pieces'):,} pieces")
        parts = [f"{name}: {_describe(part)}" for name, part in self.parts.items()]
        return ". ".join([", ".join(said), *parts, *(note.rstrip(".") for note in self.notes)]) + "."


def _conditions(part: Comparisons | PromptSet) -> dict[str, int]:
    names = (*part.condition_names, "")  # -1 is the last
    counted = np.bincount(part.conditions % len(names), minlength=len(names)).tolist()
    return {name: count for name, count in zip(names, counted, strict=True) if count}


def _describe(part: PartReport) -> str:
    if part.prompts is not None:
        named = [f"{count:,} {name or 'without a condition'}" for name, count in part.conditions.items()]
        counts = f" ({', '.join(named)})" if any(part.conditions) else ""
        what = f"{_number(part.prompts, 'prompt')}{counts}, {_number(part.tokens, 'token')}"
    elif part.pairs is None:
        what = f"{_number(part.samples, 'sample')}, {_number(part.tokens, 'token')}, {part.learned_share:.1%} learned"
    else:
        what = f"{_number(part.pairs, 'pair')} of {_number(part.samples, 'answer')}, {_number(part.tokens, 'token')}"
    return f"{what}, longest {part.longest:,}"


def _sum(report: DataReport, name: str) -> int:
    return sum(getattr(source, name) for source in report.sources)


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
