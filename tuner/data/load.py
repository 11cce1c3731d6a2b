"""From a config's sources to tokenised samples: read, render, tokenise, hold out, count, and cache."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tuner.config.data import Chat, Text
from tuner.data import cache
from tuner.data.conversation import Conversation, Document
from tuner.data.examples import Collector, Examples, Sample, split_sample, tokenize, tokenize_text
from tuner.data.report import DataReport, PartReport, SourceReport
from tuner.data.rows import Reader
from tuner.data.sources import Row, Rows
from tuner.data.split import PartName, content_hash, part_of
from tuner.data.template import Template
from tuner.data.tokenizer import Tokenizer, encode
from tuner.errors import UserError

BATCH = 256
"""Rows tokenised at once: enough to keep the tokenizer's threads busy, and little memory."""

Progress = Callable[[int], None]
"""Called with the number of rows done so far."""


@dataclass(frozen=True)
class Dataset:
    """Tokenised samples of every part, what became of the rows, and a hash of what is learned."""

    train: Examples
    validation: Examples | None
    test: Examples | None
    report: DataReport
    fingerprint: str


def load_data(data: Chat | Text, tokenizer: Tokenizer, *, progress: Progress | None = None) -> Dataset:
    """The samples of a config's data, from the cache when nothing they are made from has changed.

    Raises UserError with `file:line` for every kind of bad row, and when nothing is left to train on.
    """
    given = {
        "files": data.sources,
        "validation_files": data.validation_sources,
        "test_files": data.test_sources,
    }
    rows = [(purpose, Rows(source)) for purpose, sources in given.items() for source in sources]
    folder, key = cache.cache_folder(data), cache.cache_key(data, tokenizer, [one for _, one in rows])
    entry = cache.load_entry(folder, key)
    if entry is None:
        with cache.locked(folder, key):
            entry = cache.load_entry(folder, key) or _build_entry(
                data, tokenizer, rows, folder, key, progress
            )
    parts, report, fingerprint = entry
    return Dataset(parts["train"], parts.get("validation"), parts.get("test"), report, fingerprint)


def _build_entry(
    data: Chat | Text,
    tokenizer: Tokenizer,
    rows: list[tuple[str, Rows]],
    folder: "cache.Path",
    key: str,
    progress: Progress | None,
) -> tuple[cache.Parts, DataReport, str]:
    builder = Builder(data, tokenizer, progress)
    for index, (purpose, one) in enumerate(rows):
        builder.add_source(one, purpose, index)
    parts, report = builder.finish()
    fingerprint = "-".join(examples.fingerprint() for examples in parts.values())
    try:
        cache.save_entry(folder, key, parts, report, fingerprint)
    except OSError as error:
        report.notes.append(f"The tokenised data were not kept in {folder} ({error.strerror or error})")
    return parts, report, fingerprint


class Builder:
    """Turns rows into samples, source by source, and counts what becomes of them."""

    def __init__(self, data: Chat | Text, tokenizer: Tokenizer, progress: Progress | None = None):
        self.data = data
        self.tokenizer = tokenizer
        self.report = DataReport()
        self._template = Template(data.template, tokenizer) if isinstance(data, Chat) else None
        self._progress = progress or (lambda done: None)
        self._collectors: dict[PartName, Collector] = {
            part: Collector() for part in ("train", "validation", "test")
        }
        self._seen: dict[bytes, PartName] = {}
        self._crossing = 0
        self._rows = 0

    def add_source(self, rows: Rows, purpose: str, index: int) -> None:
        """Read, tokenise and gather the rows of one source.

        purpose: `files`, `validation_files` or `test_files`. index: the source's number over all three.
        """
        counts = SourceReport(rows.source.path, purpose)
        self.report.sources.append(counts)
        for batch in _batches(self._kept(rows, purpose, counts), BATCH):
            samples = self._tokenize([item for _, item, _ in batch])
            for (row, item, part), sample in zip(batch, samples, strict=True):
                sample[1][:] *= rows.source.weight
                for piece in self._fit(sample, item.origin, counts):
                    self._collectors[part].add(piece, index, row.file, row.line)
            self._progress(self._rows)

    def finish(self) -> tuple[cache.Parts, DataReport]:
        """The parts that hold samples, and the report; UserError when there is nothing to train on."""
        parts = {
            part: examples for part, one in self._collectors.items() if (examples := one.finish()) is not None
        }
        if "train" not in parts:
            raise UserError(f"no row is left to train on: {self.report}")
        self.report.parts = {part: PartReport.of(examples) for part, examples in parts.items()}
        notes = self.report.notes
        for part in ("validation", "test"):
            if getattr(self.data.split, part) and part not in parts:
                notes.append(f"No row fell to the {part} part: there are too few rows for split.{part}")
        if self._crossing:
            notes.append(f"{self._crossing:,} rows of validation_files or test_files are trained on as well")
        if empty := sum(source.empty_answers for source in self.report.sources):
            notes.append(f"{empty:,} rows have an empty answer, which teaches to end at once")
        return dict(parts), self.report

    def _kept(
        self, rows: Rows, purpose: str, counts: SourceReport
    ) -> Iterator[tuple[Row, Conversation | Document, PartName]]:
        """The rows that go on to be tokenised, with the part each belongs to."""
        reader = Reader(rows.source.shape if isinstance(rows.source.shape, str) else None)
        for row in rows:
            counts.rows += 1
            self._rows += 1
            item = self._expect_kind(reader.read(row.values, row.origin))
            if not item.weight:
                counts.switched_off += 1
                continue
            content = content_hash(item)
            part = part_of(content, self.data.split) if purpose == "files" else _PURPOSES[purpose]
            if content in self._seen:
                counts.duplicates += 1
                self._crossing += self._seen[content] == "train" and part != "train"
                if self.data.duplicates == "drop" and self._seen[content] == part:
                    counts.dropped_duplicates += 1
                    continue
            self._seen.setdefault(content, part)
            if isinstance(item, Conversation):
                counts.empty_answers += any(_is_empty_answer(turn) for turn in item.turns)
            yield row, item, part

    def _expect_kind(self, item: Conversation | Document) -> Conversation | Document:
        if isinstance(item, Document) == (self._template is not None):
            found, wanted, kind = ("raw text", "conversations", "Text") if self._template else (
                "a conversation", "raw text", "Chat"
            )  # fmt: skip
            raise UserError(
                f"{item.origin}: this row is {found}, and the config wants {wanted}; use data={kind}(...)"
            )
        return item

    def _tokenize(self, items: list[Conversation | Document]) -> list[Sample]:
        if self._template is None or not isinstance(self.data, Chat):
            ids = encode(self.tokenizer, [item.text for item in items if isinstance(item, Document)])
            return tokenize_text(ids, self.tokenizer, [item.weight for item in items])
        conversations = [item for item in items if isinstance(item, Conversation)]
        if self.data.system is not None:
            conversations = [one.with_system(self.data.system) for one in conversations]
        rendered = [self._template.render(one, self.data.learn) for one in conversations]
        return tokenize(rendered, self.tokenizer)

    def _fit(self, sample: Sample, origin: str, counts: SourceReport) -> Iterable[Sample]:
        """The samples a row becomes: none, itself, its beginning, or its pieces."""
        limit, too_long = self.data.max_length, self.data.too_long
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
