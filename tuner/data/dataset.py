"""From a config's sources to tokenised samples: read, render, tokenise, hold out, count, and cache."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from tuner.config.data import Chat, Data, Preferences, Prompts, Source, Text
from tuner.data import token_cache as cache
from tuner.data.comparisons import Comparisons
from tuner.data.conversation import Conversation, Document, Preference, Prompt
from tuner.data.conversation_rows import conversation_reader
from tuner.data.data_report import DataReport, PartReport, SourceReport
from tuner.data.encoding import Tokenizer, encode
from tuner.data.examples import Collector, Examples, Sample, split_sample, tokenize, tokenize_text
from tuner.data.prompts import PromptSet
from tuner.data.sources import Row, Rows
from tuner.data.split import PARTS, PartName, content_hash, part_of, turns_of
from tuner.data.template import Template
from tuner.errors import UserError

BATCH = 256
"""Rows tokenised at once: enough to keep the tokenizer's threads busy, and little memory."""

Progress = Callable[[int], None]
"""Called with the number of rows done so far."""


Item = TypeVar("Item", Conversation | Document, Preference, Prompt)
Piece = TypeVar("Piece")
Unused = Literal["ties", "incomparable", "switched_off"]
"""Why a row is not used: a count of SourceReport."""
Part = TypeVar("Part", Examples, Comparisons, PromptSet, covariant=True)


@dataclass(frozen=True)
class Dataset(Generic[Part]):
    """Tokenised samples of every part, what became of the rows, and a hash of what is learned."""

    train: Part
    validation: Part | None
    test: Part | None
    report: DataReport
    fingerprint: str


def load_data(
    data: Chat | Text, tokenizer: Tokenizer, *, progress: Progress | None = None
) -> Dataset[Examples]:
    """The samples of a config's data, from the cache when nothing they are made from has changed.

    Raises UserError with `file:line` for every kind of bad row, and when nothing is left to train on.
    """
    parts, report, fingerprint = build(ExampleBuilder(data, tokenizer, progress))
    return Dataset(parts["train"], parts.get("validation"), parts.get("test"), report, fingerprint)


class Builder(ABC, Generic[Item, Piece, Part]):
    """Turns rows into samples, source by source, and counts what becomes of them."""

    def __init__(self, data: Data | Prompts, tokenizer: Tokenizer, progress: Progress | None = None):
        self.data = data
        self.tokenizer = tokenizer
        self.report = DataReport()
        self.template = Template(data.template, tokenizer) if not isinstance(data, Text) else None
        self._progress = progress or (lambda done: None)
        self._collectors = {part: self.collector() for part in PARTS}
        self._seen: dict[bytes, PartName] = {}
        self._crossing = 0
        self._rows = 0

    # What the kinds of data differ in

    made_from: Mapping[str, Any] = MappingProxyType({})
    """What decides the samples beside rows, tokenizer and the data's config, as JSON has it."""

    wanted: tuple[PartName, ...] = PARTS
    """Which parts are built."""

    @abstractmethod
    def collector(self) -> Any:
        """What gathers the pieces of a part."""

    @abstractmethod
    def read(self, source: Source) -> Callable[[Row], Item | Unused]:
        """How rows of a source are read; a text: the count of the report that a row without use belongs to."""

    @abstractmethod
    def tokenize(self, items: list[Item]) -> list[Piece]:
        """The items' tokens, before they are fitted to max_length."""

    @abstractmethod
    def fit(self, item: Item, piece: Piece, weight: float, counts: SourceReport) -> Iterable[Piece]:
        """What a row becomes, in pieces of at most max_length; weight: its source's."""

    def part_key(self, item: Item, content: bytes) -> bytes:
        """What decides the part that an item of this content hash falls to: equal ones never part."""
        return content

    # What they share

    def reads(self, purpose: str) -> bool:
        """Whether sources of this purpose can hold rows of a part that is wanted."""
        held_out = (part for part in PARTS[1:] if getattr(self.data.split, part))
        parts = [_PURPOSES[purpose]] if purpose in _PURPOSES else ["train", *held_out]
        return any(part in self.wanted for part in parts)

    def add_source(self, rows: Rows, purpose: str, index: int) -> None:
        """Read, tokenise and gather the rows of one source.

        purpose: `files`, `validation_files` or `test_files`. index: the source's number over all three.
        """
        counts = SourceReport(rows.source.path, purpose)
        self.report.sources.append(counts)
        for batch in _batches(self._kept(rows, purpose, counts), BATCH):
            tokenized = self.tokenize([item for _, item, _ in batch])
            for (row, item, part), whole in zip(batch, tokenized, strict=True):
                for piece in self.fit(item, whole, rows.source.weight, counts):
                    self._collectors[part].add(piece, index, row.file, row.line)
            self._progress(self._rows)

    def finish(self) -> tuple[dict[str, Part], DataReport]:
        """The parts that hold samples, and the report; UserError when there is nothing to train on."""
        parts: dict[str, Part] = {
            part: examples for part, one in self._collectors.items() if (examples := one.finish()) is not None
        }
        if "train" in self.wanted and "train" not in parts:
            too_long = any(source.dropped_too_long for source in self.report.sources)
            way_out = "raise max_length" if too_long else "hold fewer out" if parts else "give others"
            read = ", ".join(source.path for source in self.report.sources if source.purpose == "files")
            raise UserError(f"{read}: no row is left to train on: {str(self.report).rstrip('.')}; {way_out}")
        self.report.parts = {part: PartReport.of(examples) for part, examples in parts.items()}
        notes = self.report.notes
        for part in ("validation", "test"):
            if getattr(self.data.split, part) and part not in parts:
                notes.append(f"No row fell to the {part} part: there are too few rows for split.{part}")
        if self._crossing:
            notes.append(f"{self._crossing:,} rows of validation_files or test_files are trained on as well")
        if empty := sum(source.empty_answers for source in self.report.sources):
            teaches = "" if isinstance(self.data, Preferences) else ", which teaches to end at once"
            notes.append(f"{empty:,} rows have an empty answer{teaches}")
        return parts, self.report

    def _kept(self, rows: Rows, purpose: str, counts: SourceReport) -> Iterator[tuple[Row, Item, PartName]]:
        """The rows that go on to be tokenised, with the part each belongs to."""
        read = self.read(rows.source)
        for row in rows:
            counts.rows += 1
            self._rows += 1
            item = read(row)
            if isinstance(item, str) or not item.weight:
                unused = item if isinstance(item, str) else "switched_off"
                setattr(counts, unused, getattr(counts, unused) + 1)
                continue
            content = content_hash(item)
            part = _PURPOSES.get(purpose) or part_of(self.part_key(item, content), self.data.split)
            if content in self._seen:
                counts.duplicates += 1
                self._crossing += self._seen[content] == "train" and part != "train"
                if self.data.duplicates == "drop" and self._seen[content] == part:
                    counts.dropped_duplicates += 1
                    continue
            self._seen.setdefault(content, part)
            counts.empty_answers += any(_is_empty_answer(turn) for turn in turns_of(item))
            if part in self.wanted:
                yield row, item, part


def build(builder: Builder[Item, Piece, Part]) -> tuple[dict[str, Part], DataReport, str]:
    """Parts, report and fingerprint of a config's data: from the cache, or built and then kept there.

    The note that a full disk leaves no cache is added to the report.
    """
    data = builder.data
    given = {
        "files": data.sources,
        "validation_files": data.validation_sources,
        "test_files": data.test_sources,
    }
    rows = [(purpose, Rows(source)) for purpose, sources in given.items() for source in sources]
    folder = cache.cache_folder(data)
    key = cache.cache_key(data, builder.tokenizer, [one for _, one in rows], builder.made_from)
    if (entry := cache.load_entry(folder, key)) is not None:
        return entry  # type: ignore[return-value]
    with cache.locked(folder, key):
        return cache.load_entry(folder, key) or _build_entry(builder, rows, folder, key)  # type: ignore[return-value]


def _build_entry(
    builder: Builder[Item, Piece, Part], rows: list[tuple[str, Rows]], folder: "cache.Path", key: str
) -> tuple[dict[str, Part], DataReport, str]:
    for index, (purpose, one) in enumerate(rows):
        if builder.reads(purpose):
            builder.add_source(one, purpose, index)
    parts, report = builder.finish()
    fingerprint = "-".join(examples.fingerprint() for examples in parts.values())
    try:
        cache.save_entry(folder, key, parts, report, fingerprint)
    except OSError as error:
        report.notes.append(f"The tokenised data were not kept in {folder} ({error.strerror or error})")
    return parts, report, fingerprint


class ExampleBuilder(Builder[Conversation | Document, Sample, Examples]):
    """Conversations and documents to samples."""

    data: Chat | Text

    def collector(self) -> Collector:
        return Collector()

    def read(self, source: Source) -> Callable[[Row], Conversation | Document]:
        reader = conversation_reader(source.shape if isinstance(source.shape, str) else None)
        return lambda row: self._expect_kind(reader.read(row.values, row.origin))

    def _expect_kind(self, item: Conversation | Document) -> Conversation | Document:
        if isinstance(item, Document) == (self.template is not None):
            found, wanted, kind = ("raw text", "conversations", "Text") if self.template else (
                "a conversation", "raw text", "Chat"
            )  # fmt: skip
            raise UserError(
                f"{item.origin}: this row is {found}, and the config wants {wanted}; use data={kind}(...)"
            )
        return item

    def tokenize(self, items: list[Conversation | Document]) -> list[Sample]:
        if self.template is None or not isinstance(self.data, Chat):
            ids = encode(self.tokenizer, [item.text for item in items if isinstance(item, Document)])
            return tokenize_text(ids, self.tokenizer, [item.weight for item in items])
        conversations = [item for item in items if isinstance(item, Conversation)]
        if self.data.system is not None:
            conversations = [one.with_system(self.data.system) for one in conversations]
        rendered = [self.template.render(one, self.data.learn) for one in conversations]
        return tokenize(rendered, self.tokenizer)

    def fit(
        self, item: Conversation | Document, piece: Sample, weight: float, counts: SourceReport
    ) -> Iterable[Sample]:
        """The samples a row becomes: none, itself, its beginning, or its pieces."""
        limit, too_long, origin = self.data.max_length, self.data.too_long, item.origin
        sample = piece[0], piece[1] * np.float32(weight)
        length = len(sample[0])
        counts.longest = max(counts.longest, length)
        if not sample[1].any():
            raise UserError(
                f"{origin}: nothing to learn: every token of this row has weight 0; learn one of its turns, "
                "or take the row out"
            )
        if length > limit:
            counts.too_long += 1
            if too_long == "error":
                raise UserError(
                    f"{origin}: {length:,} tokens, more than max_length {limit:,}; raise max_length, shorten "
                    'the row, or set too_long="drop" or "cut"'
                )
            if too_long == "drop":
                counts.dropped_too_long += 1
                return ()
            if too_long == "cut":
                sample = (sample[0][:limit], sample[1][:limit])
                if not sample[1].any():
                    counts.cut_to_nothing += 1
                    return ()
                counts.cut += 1
        counts.kept += 1
        pieces = split_sample(sample, limit)
        if len(pieces) > 1:
            counts.split += 1
            counts.pieces += len(pieces)
        return [piece for piece in pieces if piece[1].any()]


_PURPOSES: dict[str, PartName] = {"validation_files": "validation", "test_files": "test"}


def _is_empty_answer(turn: object) -> bool:
    return getattr(turn, "role", "") == "assistant" and not (
        getattr(turn, "content", "") or getattr(turn, "tool_calls", ())
    )


def _batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
