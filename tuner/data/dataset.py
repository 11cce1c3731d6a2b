"""From a config's sources to the parts of a dataset, whatever its rows are: read, hold out, count, and cache."""

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Literal, Protocol, TypeVar

from tuner.config.data import Data, Preferences, Prompts, Reading, Source, Text
from tuner.data import token_cache as cache
from tuner.data.comparisons import Comparisons
from tuner.data.control_tokens import ControlTokens
from tuner.data.conversation import Conversation, Document, Preference, Prompt
from tuner.data.data_report import DataReport, PartReport, SourceReport
from tuner.data.encoding import Tokenizer
from tuner.data.examples import Examples
from tuner.data.labels import Labels
from tuner.data.lost_content import LostContentError
from tuner.data.prompts import PromptSet
from tuner.data.rendered import Rendered
from tuner.data.sources import Row, Rows
from tuner.data.split import PARTS, PartName, assign_part, content_hash, trainable_turns
from tuner.data.template import Template
from tuner.errors import UserError

BATCH = 256
"""Rows tokenized at once: enough to keep the tokenizer's threads busy, in little memory."""

Progress = Callable[[int], None]
"""Called with the number of rows processed so far."""

Item = TypeVar("Item", Conversation | Document, Preference, Prompt)
"""A row as its reader returns it."""
Piece = TypeVar("Piece")
"""A tokenized row, or a part of one, that fits max_length."""
Part = TypeVar("Part", Examples, Comparisons, Labels, PromptSet, covariant=True)
"""The pieces of train, validation or test."""
Piece_contra = TypeVar("Piece_contra", contravariant=True)
SkipReason = Literal["ties", "incomparable", "switched_off"]
"""Why a row is not used: the name of a count of SourceReport."""


@dataclass(frozen=True)
class Dataset(Generic[Part]):
    """Tokenized samples of every part, the report on the rows, and a hash of all that the loss depends on."""

    train: Part
    validation: Part | None
    test: Part | None
    report: DataReport
    fingerprint: str


class PieceCollector(Protocol[Piece_contra, Part]):
    """Collects the pieces of one part."""

    def add(self, piece: Piece_contra, source: int, file: str, line: int, /) -> None:
        """Append a piece of the row at `file:line`; source: the number of its source."""

    def finish(self) -> Part | None:
        """All pieces as one set; None when there are none."""


class Builder(ABC, Generic[Item, Piece, Part]):
    """Turns rows into the samples of every part, source by source, and counts what becomes of them."""

    def __init__(self, data: Data | Prompts, tokenizer: Tokenizer, progress: Progress | None = None):
        self.data = data
        self.tokenizer = tokenizer
        self.report = DataReport()
        spelled_tokens = data.spelled_tokens
        self.template = (
            None if isinstance(data, Text) else Template(data.template, tokenizer, self.spelled_tokens)
        )
        self.control = (
            self.template.control if self.template else ControlTokens.of_texts(tokenizer, spelled_tokens)
        )
        self.control.check(spelled_tokens, self.section)
        self.report.control_tokens = dict(self.control.readings)
        self._progress = progress or _ignore_progress
        self._collectors = {part: self.collector() for part in PARTS}
        self._first_part: dict[
            bytes, PartName
        ] = {}  # content hash -> part of the first row with that content
        self._num_leaked = 0
        self._num_rows = 0

    # Per kind of data

    cache_inputs: Mapping[str, Any] = MappingProxyType({})
    """What decides the samples beside rows, tokenizer and the data's config, as JSON values."""

    section: str = "data"
    """The field of the config that the data stands in, for messages."""

    wanted: tuple[PartName, ...] = PARTS
    """The parts to build."""

    @property
    def spelled_tokens(self) -> Mapping[str, Reading]:
        """How tokens are read that a turn's text spells, where that is not the default."""
        return self.data.spelled_tokens

    @abstractmethod
    def collector(self) -> PieceCollector[Piece, Part]:
        """A new collector for the pieces of a part."""

    @abstractmethod
    def read(self, source: Source) -> Callable[[Row], Item | SkipReason]:
        """The reader of a source's rows; of a row that is not used it returns why."""

    @abstractmethod
    def render(self, item: Item, counts: SourceReport) -> list[Rendered]:
        """The item's texts. Raises UserError where the template cannot write it."""

    @abstractmethod
    def tokenize(self, rendered: list[tuple[Item, list[Rendered]]]) -> list[list[Piece]]:
        """The tokens of every item and its texts, before they are fitted to max_length."""

    @abstractmethod
    def fit(self, item: Item, piece: Piece, weight: float, counts: SourceReport) -> Iterable[Piece]:
        """A row's pieces of at most max_length tokens, counted in `counts`; weight: its source's."""

    def spelled_names(self, rendered: Rendered) -> set[str]:
        """The control tokens that a text spells; the report counts them."""
        return set() if rendered.spelled is None else rendered.spelled.names(rendered.text)

    def gather(self, rows: Rows, counts: SourceReport) -> Iterable[Row]:
        """The rows to read: those of the source; where several are read as one, the others are counted in `counts`."""
        return rows

    def part_key(self, item: Item, content: bytes) -> bytes:
        """The key that decides an item's part; items of equal keys go to the same one. content: the item's hash."""
        return content

    # Shared

    def reads(self, purpose: str) -> bool:
        """Whether sources of this purpose can hold rows of a wanted part."""
        held_out = (part for part in PARTS[1:] if getattr(self.data.split, part))
        parts = [_PURPOSES[purpose]] if purpose in _PURPOSES else ["train", *held_out]
        return any(part in self.wanted for part in parts)

    def add_source(self, rows: Rows, purpose: str, index: int) -> None:
        """Read, tokenize and collect the rows of one source.

        purpose: `files`, `validation_files` or `test_files`. index: the source's number, counted over all three.
        """
        counts = SourceReport(rows.source.path, purpose)
        self.report.sources.append(counts)
        for batch in _batches(self._read_rows(rows, purpose, counts), BATCH):
            tokenized = self.tokenize([(item, rendered) for _, item, rendered, _ in batch])
            for (row, item, _, part), wholes in zip(batch, tokenized, strict=True):
                for piece in (
                    piece for whole in wholes for piece in self.fit(item, whole, rows.source.weight, counts)
                ):
                    self._collectors[part].add(piece, index, row.file, row.line)
            self._progress(self._num_rows)

    def finish(self) -> tuple[dict[str, Part], DataReport]:
        """The parts that have samples, and the report. Raises UserError when no row is left to train on."""
        parts: dict[str, Part] = {
            part: examples
            for part, collector in self._collectors.items()
            if (examples := collector.finish()) is not None
        }
        if "train" in self.wanted and "train" not in parts:
            too_long = any(source.dropped_too_long for source in self.report.sources)
            lost = any(source.lost for source in self.report.sources)
            remedy = "raise max_length" if too_long else "hold fewer out" if parts else "give other files"
            if lost and not too_long:
                remedy = f"take out {self.section}.drop to see what is lost"
            paths = ", ".join(source.path for source in self.report.sources if source.purpose == "files")
            raise UserError(f"{paths}: no row is left to train on: {str(self.report).rstrip('.')}; {remedy}")
        self.report.parts = {part: PartReport.of(examples) for part, examples in parts.items()}
        notes = self.report.notes
        for part in ("validation", "test"):
            if getattr(self.data.split, part) and part not in parts:
                notes.append(f"No row fell to the {part} part: there are too few rows for split.{part}")
        if self._num_leaked:
            notes.append(
                f"{self._num_leaked:,} rows of validation_files or test_files are trained on as well"
            )
        if lost := sum((Counter(source.lost) for source in self.report.sources), Counter[str]()):
            causes = ", ".join(f"{count:,} for their {content}" for content, count in lost.items())
            notes.append(f"{lost.total():,} rows were dropped by {self.section}.drop: {causes}")
        notes += self._notes_on_control_tokens()
        if changed := sum(source.changed for source in self.report.sources):
            views = sum(source.views for source in self.report.sources)
            notes.append(
                f"{changed:,} conversations became {views:,} samples, one for each learned turn: the template renders "
                'turns differently once others follow (learn="last" learns the last one alone)'
            )
        if empty := sum(source.empty_answers for source in self.report.sources):
            effect = "" if isinstance(self.data, Preferences) else ", which teaches to end at once"
            notes.append(f"{empty:,} rows have an empty answer{effect}")
        return parts, self.report

    def _notes_on_control_tokens(self) -> Iterator[str]:
        spelled = sum((Counter(source.spelled) for source in self.report.sources), Counter[str]())
        for plural, other in (("text", "token"), ("tokens", "text")):
            names = [
                name for name in spelled if (self.control.readings[name] == "token") == (other == "text")
            ]
            if names:
                counts = ", ".join(f"{name} in {spelled[name]:,}" for name in names)
                yield (
                    f"Rows spell control tokens, which are encoded as {plural} ({counts}); "
                    f'{self.section}.spelled_tokens={{"{names[0]}": "{other}"}} changes it'
                )

    def _read_rows(
        self, rows: Rows, purpose: str, counts: SourceReport
    ) -> Iterator[tuple[Row, Item, list[Rendered], PartName]]:
        """The rows to tokenize with their texts, and the part each belongs to; the others are counted."""
        read = self.read(rows.source)
        for row in self.gather(rows, counts):
            counts.rows += 1
            self._num_rows += 1
            try:
                item = read(row)
                if isinstance(item, str) or not item.weight:
                    reason = item if isinstance(item, str) else "switched_off"
                    setattr(counts, reason, getattr(counts, reason) + 1)
                    continue
                part = self._part(item, purpose, counts)
                if part is not None and part in self.wanted:
                    rendered = self.render(item, counts)
                    counts.empty_answers += any(_is_empty_answer(turn) for turn in trainable_turns(item))
                    counts.count_spelled(map(self.spelled_names, rendered))
                    yield row, item, rendered, part
            except LostContentError as error:
                self._drop(error, counts)

    def _part(self, item: Item, purpose: str, counts: SourceReport) -> PartName | None:
        """The part an item belongs to; None for a duplicate that is dropped. Duplicates are counted."""
        content = content_hash(item)
        part = _PURPOSES.get(purpose) or assign_part(self.part_key(item, content), self.data.split)
        if content in self._first_part:
            counts.duplicates += 1
            self._num_leaked += self._first_part[content] == "train" and part != "train"
            # only within a part: held-out rows that are trained on as well stay, and are reported
            if self.data.duplicates == "drop" and self._first_part[content] == part:
                counts.dropped_duplicates += 1
                return None
        self._first_part.setdefault(content, part)
        return part

    def _drop(self, error: LostContentError, counts: SourceReport) -> None:
        """Count a row whose content would be lost, if the config drops such rows; else raise the error."""
        if error.content not in getattr(self.data, "drop", ()):
            raise UserError(
                f'{error}, or leave such rows out with {self.section}.drop=["{error.content}"]'
            ) from error
        counts.lost[error.content] = counts.lost.get(error.content, 0) + 1


def build(builder: Builder[Item, Piece, Part]) -> tuple[dict[str, Part], DataReport, str]:
    """Parts, report and fingerprint of a config's data: from the cache, or built and then cached.

    Where the cache cannot be written, such as on a full disk, the report says so.
    """
    data = builder.data
    sources_of_purpose = {
        "files": data.sources,
        "validation_files": data.validation_sources,
        "test_files": data.test_sources,
    }
    sources = [(purpose, Rows(source)) for purpose, group in sources_of_purpose.items() for source in group]
    folder = cache.cache_folder(data)
    key = cache.cache_key(data, builder.tokenizer, [rows for _, rows in sources], builder.cache_inputs)
    if (entry := cache.load_entry(folder, key)) is not None:
        return entry
    with cache.locked(folder, key):
        # again: another process may have built it while this one waited for the lock
        return cache.load_entry(folder, key) or _build_entry(builder, sources, folder, key)


def _build_entry(
    builder: Builder[Item, Piece, Part], sources: list[tuple[str, Rows]], folder: Path, key: str
) -> tuple[dict[str, Part], DataReport, str]:
    for index, (purpose, rows) in enumerate(sources):
        if builder.reads(purpose):
            builder.add_source(rows, purpose, index)
    parts, report = builder.finish()
    fingerprint = "-".join(examples.fingerprint() for examples in parts.values())
    try:
        cache.save_entry(folder, key, parts, report, fingerprint)
    except OSError as error:
        report.notes.append(f"The tokenized data could not be cached in {folder} ({error.strerror or error})")
    return parts, report, fingerprint


_PURPOSES: dict[str, PartName] = {"validation_files": "validation", "test_files": "test"}


def _is_empty_answer(turn: object) -> bool:
    return getattr(turn, "role", "") == "assistant" and not (
        getattr(turn, "content", "").strip() or getattr(turn, "tool_calls", ())
    )


def _ignore_progress(num_rows: int) -> None:
    pass


T = TypeVar("T")


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
