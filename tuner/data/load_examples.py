"""From a config's sources to tokenized conversations and documents: read, render, tokenize, cut or split, and count."""

import itertools
from collections.abc import Callable, Iterable

import numpy as np

from tuner.config.data import Chat, Source, Text
from tuner.data.control_tokens import ControlTokens
from tuner.data.conversation import Conversation, Document
from tuner.data.conversation_rows import conversation_reader
from tuner.data.data_report import DataReport, SourceReport
from tuner.data.dataset import Builder, Dataset, Progress, build
from tuner.data.encoding import Tokenizer
from tuner.data.examples import Collector, Examples, Sample, split_sample, tokenize, tokenize_text
from tuner.data.rendered import Rendered, encode
from tuner.data.sources import Row
from tuner.errors import UserError


def load_examples(
    data: Chat | Text, tokenizer: Tokenizer, *, progress: Progress | None = None
) -> Dataset[Examples]:
    """The samples of conversations and documents; from the cache when nothing that decides them has changed.

    Raises UserError with `file:line` for every kind of bad row, and when no row is left to train on.
    """
    parts, report, fingerprint = build(ExampleBuilder(data, tokenizer, progress))
    return Dataset(parts["train"], parts.get("validation"), parts.get("test"), report, fingerprint)


class ExampleBuilder(Builder[Conversation | Document, Sample, Examples]):
    """Conversations and documents to samples."""

    data: Chat | Text

    def __init__(self, data: Chat | Text, tokenizer: Tokenizer, progress: Progress | None = None):
        super().__init__(data, tokenizer, progress)
        self._special = ControlTokens(tokenizer)
        if self.template is not None:
            self.template.check_answers_end()

    def spelled_names(self, rendered: Rendered) -> set[str]:
        """Of a document also those that are encoded as tokens: they were perhaps not meant."""
        if self.template is not None:
            return super().spelled_names(rendered)
        spelled = self._special.spelled(rendered.text)
        return set() if spelled is None else spelled.names(rendered.text)

    def collector(self) -> Collector:
        return Collector()

    def finish(self) -> tuple[dict[str, Examples], DataReport]:
        """As of every builder; the report says where rows of one length only leave `short_rows` without effect."""
        parts, report = super().finish()
        if (short := self.data.short_rows) is not None and "train" in parts:
            is_short_N = parts["train"].lengths < short.below
            if is_short_N.all() or not is_short_N.any():
                which = "under" if is_short_N.all() else "at least"
                report.notes.append(
                    f"All rows have {which} {short.below:,} tokens, so {self.section}.short_rows changes nothing"
                )
        return parts, report

    def read(self, source: Source) -> Callable[[Row], Conversation | Document]:
        reader = conversation_reader(source.shape if isinstance(source.shape, str) else None)
        return lambda row: self._expect_kind(reader.read(row.values, row.origin))

    def _expect_kind(self, item: Conversation | Document) -> Conversation | Document:
        if isinstance(item, Document) == (self.template is not None):
            content, expected, remedy = (
                ("raw text", "conversations", "Text")
                if self.template
                else ("a conversation", "raw text", "Chat")
            )
            raise UserError(
                f"{item.origin}: this row is {content}, and the config wants {expected}; use data={remedy}(...)"
            )
        return item

    def render(self, item: Conversation | Document, counts: SourceReport) -> list[Rendered]:
        if isinstance(item, Document):
            return [Rendered(item.text, origin=item.origin, spelled=self.control.spelled(item.text))]
        assert self.template is not None
        assert isinstance(self.data, Chat)
        if self.data.system is not None:
            item = item.with_system(self.data.system)
        split = self.data.changed_turns == "split"
        views = self.template.views(item, self.data.learn) if split else [item]
        if len(views) > 1 or views[0] is not item:
            counts.changed += 1
            counts.views += len(views)
        return [self.template.render_row(view, self.data.learn) for view in views]

    def tokenize(self, rendered: list[tuple[Conversation | Document, list[Rendered]]]) -> list[list[Sample]]:
        whole = [text for _, texts in rendered for text in texts]
        if self.template is None:
            ids, weights = encode(self.tokenizer, whole), [document.weight for document, _ in rendered]
            return [[sample] for sample in tokenize_text(ids, self.tokenizer, weights)]
        samples = iter(tokenize(whole, self.tokenizer))
        return [list(itertools.islice(samples, len(texts))) for _, texts in rendered]

    def fit(
        self, item: Conversation | Document, piece: Sample, weight: float, counts: SourceReport
    ) -> Iterable[Sample]:
        """The samples of a row: itself, its beginning, its pieces, or none."""
        limit, too_long, origin = self.data.max_length, self.data.too_long, item.origin
        sample = piece[0], piece[1] * np.float32(weight)
        length = len(sample[0])
        counts.longest = max(counts.longest, length)
        # not skipped quietly: a file of such rows would train on a loss of 0 or NaN
        if not sample[1].any():
            raise UserError(
                f"{origin}: no token to take the loss on: every token of this row has weight 0; give one of its turns "
                "a weight, or take the row out"
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
        # a piece without a target token would cost a forward pass and train nothing
        return [piece for piece in pieces if piece[1].any()]
