"""The data report: what became of every source's rows and what the parts hold, as counts and as a paragraph."""

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tuner.config.data import Reading
from tuner.data.comparisons import Comparisons
from tuner.data.examples import Examples
from tuner.data.labels import Labels
from tuner.data.prompts import PromptSet

HISTOGRAM = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Upper bounds (inclusive) of the bins of sample lengths, in tokens; one more bin holds the longer ones."""


@dataclass
class SourceReport:
    """Counts of one source's rows. A row is kept, or dropped for a reason counted here; a kept one may be split."""

    path: str
    purpose: str
    """`files`, `validation_files` or `test_files`."""
    rows: int = 0
    kept: int = 0
    duplicates: int = 0
    """Rows equal to an earlier one, dropped only with duplicates="drop"."""
    dropped_duplicates: int = 0
    too_long: int = 0
    dropped_too_long: int = 0
    cut: int = 0
    cut_to_nothing: int = 0
    """Rows dropped because cutting them to max_length would leave no target token."""
    split: int = 0
    pieces: int = 0
    """Samples that the split rows became."""
    switched_off: int = 0
    """Rows dropped because their own weight is 0."""
    ties: int = 0
    """Rows dropped because all their answers have the same rank (ties="drop")."""
    incomparable: int = 0
    """Rows dropped because their answers cannot be compared (incomparable="drop")."""
    joined: int = 0
    """Rows of one answer each that were put together with an earlier one of the same prompt, and are kept or dropped
    with it."""
    lost: dict[str, int] = field(default_factory=dict[str, int])
    """Rows dropped by the config's `drop`: what would be lost -> rows."""
    changed: int = 0
    """Conversations split because the template renders a learned turn differently once others follow."""
    views: int = 0
    """Samples that these became, one for each learned turn."""
    empty_answers: int = 0
    """Rows with an assistant turn without text, which teaches the model to end its answer at once."""
    longest: int = 0
    """Length of the longest sample before any cut, in tokens."""
    spelled: dict[str, int] = field(default_factory=dict[str, int])
    """Control token -> rows with a turn that spells it, which is encoded as text."""

    def count_spelled(self, names_of_texts: Iterable[Collection[str]]) -> None:
        """Count a row by the names of the control tokens that each of its texts spells."""
        for name in sorted({name for names in names_of_texts for name in names}):
            self.spelled[name] = self.spelled.get(name, 0) + 1


@dataclass(frozen=True)
class PartReport:
    """Counts of one part: train, validation or test."""

    samples: int
    tokens: int
    target_tokens: int
    """Tokens that the loss is taken on."""
    target_weight: float
    """Their summed loss weight."""
    longest: int
    histogram: tuple[int, ...]
    """Samples per bin of HISTOGRAM."""
    pairs: int | None = None
    """Pairs of answers, of a part of comparisons; each of its samples is one answer."""
    conditions: dict[str, int] = field(default_factory=dict[str, int])
    """Rows of each condition; "" for those without one."""
    prompts: int | None = None
    """Prompts, of a part of prompts for a policy; each of its samples is one."""

    @classmethod
    def of(cls, part: Examples | Comparisons | Labels | PromptSet) -> "PartReport":
        """The counts of a part."""
        if isinstance(part, Comparisons):
            return replace(cls.of(part.sequences), pairs=len(part.better), conditions=_conditions(part))
        if isinstance(part, Labels):
            return cls.of(part.sequences)
        if isinstance(part, PromptSet):
            return replace(cls.of(part.examples()), prompts=len(part), conditions=_conditions(part))
        examples, lengths = part, part.lengths
        bins = np.bincount(np.searchsorted(HISTOGRAM, lengths), minlength=len(HISTOGRAM) + 1)
        return cls(
            samples=len(examples),
            tokens=int(lengths.sum()),
            target_tokens=int(np.count_nonzero(examples.weights_T)),
            target_weight=float(examples.weights_T.sum(dtype=np.float64)),
            longest=int(lengths.max()),
            histogram=tuple(int(count) for count in bins),
        )

    @property
    def target_share(self) -> float:
        """Share of the tokens that the loss is taken on."""
        return self.target_tokens / self.tokens


@dataclass
class DataReport:
    """What became of every source's rows, and what the parts hold."""

    sources: list[SourceReport] = field(default_factory=list[SourceReport])
    parts: dict[str, PartReport] = field(default_factory=dict[str, PartReport])
    notes: list[str] = field(default_factory=list[str])
    """What the user should know, a sentence each."""
    control_tokens: dict[str, Reading] = field(default_factory=dict[str, Reading])
    """Added token of the tokenizer -> how it is read where a text spells it: see ControlTokens."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataReport":
        """The report that `to_dict` wrote."""
        parts: dict[str, PartReport] = {}
        for name, part in values["parts"].items():
            fields: dict[str, Any] = {**part, "histogram": tuple(part["histogram"])}
            parts[name] = PartReport(**fields)
        return cls(
            [SourceReport(**source) for source in values["sources"]],
            parts,
            list(values["notes"]),
            dict(values["control_tokens"]),
        )

    def __str__(self) -> str:
        """The report as one paragraph."""
        clauses = [f"{_sum(self, 'rows'):,} rows read from {_count(len(self.sources), 'source')}"]
        counts = {
            "answers to the prompt of an earlier one": _sum(self, "joined"),
            "equal to an earlier one and kept": _sum(self, "duplicates") - _sum(self, "dropped_duplicates"),
            "equal to an earlier one and dropped": _sum(self, "dropped_duplicates"),
            "too long and dropped": _sum(self, "dropped_too_long"),
            "cut": _sum(self, "cut"),
            "dropped because the cut left no token to take the loss on": _sum(self, "cut_to_nothing"),
            "tied and dropped": _sum(self, "ties"),
            "incomparable and dropped": _sum(self, "incomparable"),
            "switched off": _sum(self, "switched_off"),
            "dropped because the text would lack some of their content": sum(
                sum(source.lost.values()) for source in self.sources
            ),
        }
        clauses += [f"{count:,} {outcome}" for outcome, count in counts.items() if count]
        if _sum(self, "split"):
            clauses.append(f"{_sum(self, 'split'):,} split into {_sum(self, 'pieces'):,} pieces")
        parts = [f"{name}: {_describe(part)}" for name, part in self.parts.items()]
        return ". ".join([", ".join(clauses), *parts, *(note.rstrip(".") for note in self.notes)]) + "."


def _conditions(part: Comparisons | PromptSet) -> dict[str, int]:
    names = (*part.condition_names, "")  # -1, no condition, indexes the last
    counts = np.bincount(part.conditions % len(names), minlength=len(names)).tolist()
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def _describe(part: PartReport) -> str:
    if part.prompts is not None:
        conditions = [f"{count:,} {name or 'without a condition'}" for name, count in part.conditions.items()]
        rows = _count(part.prompts, "prompt") + (
            f" ({', '.join(conditions)})" if any(part.conditions) else ""
        )
    elif part.pairs is not None:
        rows = f"{_count(part.pairs, 'pair')} of {_count(part.samples, 'answer')}"
    else:
        rows = _count(part.samples, "sample")
    loss = (
        "" if part.prompts is not None or part.pairs is not None else f", {part.target_share:.1%} in the loss"
    )
    return f"{rows}, {_count(part.tokens, 'token')}{loss}, longest {part.longest:,}"


def _sum(report: DataReport, name: str) -> int:
    return sum(getattr(source, name) for source in report.sources)


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
