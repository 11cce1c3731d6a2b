"""From a config's sources to tokenized comparisons: read, condition, render, tokenize, hold out, count, and cache."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from tuner.config.data import Preferences, Reading, Source
from tuner.data.answers import IncomparableError, read_reference
from tuner.data.comparisons import ComparisonCollector, Comparisons, TokenizedComparison
from tuner.data.conditions import Conditions, drawing_key
from tuner.data.control_tokens import reward_readings
from tuner.data.conversation import Preference
from tuner.data.data_report import DataReport, SourceReport
from tuner.data.dataset import Builder, Dataset, Progress, SkipReason, build
from tuner.data.encoding import Tokenizer, is_one_token
from tuner.data.examples import Sample, tokenize
from tuner.data.labels import Labels
from tuner.data.preference_rows import join_answers, preference_reader
from tuner.data.rendered import Rendered
from tuner.data.row_shapes import Reader
from tuner.data.sources import Row, Rows
from tuner.data.split import PartName, hash_values, plain_turns
from tuner.data.template import Template
from tuner.errors import UserError


def load_preferences(
    data: Preferences,
    tokenizer: Tokenizer,
    conditions: Conditions,
    reward_token: str | None,
    *,
    progress: Progress | None = None,
) -> Dataset[Comparisons]:
    """The comparisons of a config's data; from the cache when nothing that decides them has changed.

    Raises UserError with `file:line` for every kind of bad row and an unknown condition, and for a reward token that
    the tokenizer splits.
    """
    parts, report, fingerprint = build(
        ComparisonBuilder(data, tokenizer, conditions, reward_token, progress=progress)
    )
    report.notes += [
        f"No row is of condition {name!r}"
        for name in conditions.wordings
        if not any(name in part.conditions for part in report.parts.values())
    ]
    without = sum(part.conditions.get("", 0) for part in report.parts.values())
    if conditions.wordings and without:
        report.notes.append(
            f"{without:,} rows name no condition, and are trained and measured without one, unlike the others"
        )
    return Dataset(parts["train"], parts.get("validation"), parts.get("test"), report, fingerprint)


def load_test_preferences(
    data: Preferences, tokenizer: Tokenizer, conditions: Conditions, reward_token: str | None
) -> Comparisons | None:
    """The test part alone, its conditions presented as `conditions.presentation` says; None when it has no rows."""
    builder = ComparisonBuilder(data, tokenizer, conditions, reward_token, wanted=("test",))
    return build(builder)[0].get("test")


class SequenceMaker:
    """Encodes a reward model's input: a rendered conversation, and the reward token at which its score is read."""

    def __init__(self, tokenizer: Tokenizer, reward_token: str | None) -> None:
        """reward_token: None reads the score at the last token. Raises UserError when the tokenizer splits it."""
        self._tokenizer = tokenizer
        if reward_token is not None and not is_one_token(tokenizer, reward_token):
            raise UserError(
                f"reward_token {reward_token!r} is no token of this model's; name an unused one of its own"
                f"{_unused_tokens(tokenizer)}"
            )
        end = [] if reward_token is None else [tokenizer.convert_tokens_to_ids(reward_token)]
        self._end = np.array(end, dtype=np.int32)

    def make(self, rendered: list[Rendered]) -> list[tuple[np.ndarray, int]]:
        """(tokens int32 [t], index of the answer's first token) of every rendered conversation."""
        return [(tokens, start) for (tokens, _), start in self.make_samples(rendered)]

    def make_samples(self, rendered: list[Rendered]) -> list[tuple[Sample, int]]:
        """The same, each with the weights that SFT gives its tokens: 1 in the assistant's turns of the answer."""
        sequences: list[tuple[Sample, int]] = []
        for tokens, weights in tokenize(rendered, self._tokenizer):
            targets = weights.nonzero()[0]
            # appended as an id: as text it could merge with what precedes it
            sequence = np.concatenate([tokens, self._end])
            weights = np.concatenate([weights, np.zeros(len(self._end), dtype=np.float32)])
            start = int(targets[0]) if len(targets) else len(sequence) - 1
            sequences.append(((sequence, weights), start))
        return sequences


RankedPart = TypeVar("RankedPart", Comparisons, Labels)


class RankedBuilder(Builder[Preference, TokenizedComparison, RankedPart]):
    """Reads, renders and fits preferences."""

    data: Preferences
    template: Template

    def __init__(
        self,
        data: Preferences,
        tokenizer: Tokenizer,
        conditions: Conditions,
        reward_token: str | None,
        *,
        wanted: tuple[PartName, ...] | None = None,
        progress: Progress | None = None,
    ):
        # before super(), which calls collector()
        self._conditions, self._reward_token = conditions, reward_token
        self._remarks: Counter[str] = Counter()
        super().__init__(data, tokenizer, progress)
        if self.template.needs_reference and data.too_long == "cut":
            raise UserError(
                f'{self.section}.too_long="cut": template {data.template!r} writes the prompt twice, and both would '
                'have to be cut alike; write "error" or "drop"'
            )
        self._sequences = SequenceMaker(tokenizer, reward_token)
        self.wanted = wanted or self.wanted
        self.cache_inputs: Mapping[str, Any] = {
            "conditions": asdict(conditions),
            "reward_token": reward_token,
            "wanted": self.wanted,
        }

    @property
    def spelled_tokens(self) -> Mapping[str, Reading]:
        return reward_readings(self.data.spelled_tokens, self._reward_token)

    def reader(self, source: Source) -> Reader:
        """Of a source's rows."""
        return preference_reader(source.shape if isinstance(source.shape, str) else None)

    def gather(self, rows: Rows, counts: SourceReport) -> Iterator[Row]:
        for row, number in join_answers(rows, self.reader(rows.source)):
            counts.rows += number - 1
            counts.joined += number - 1
            yield row

    def read(self, source: Source) -> Callable[[Row], Preference | SkipReason]:
        reader = self.reader(source)

        def read(row: Row) -> Preference | SkipReason:
            try:
                preference: Preference = reader.read(row.values, row.origin)
            except IncomparableError as error:
                if self.data.incomparable == "error":
                    raise UserError(f'{error}, or set incomparable="drop"') from error
                return "incomparable"
            if self.template.needs_reference:
                preference = preference.with_reference(read_reference(row.values, row.origin))
            self._remarks.update(preference.remarks)
            is_tied = len(preference.ranks) > 1 and preference.ranks[-1] == 0
            if is_tied and self.data.ties == "drop":
                return "ties"
            return preference if preference.condition else replace(preference, condition=source.condition)

        return read

    def part_key(self, item: Preference, content: bytes) -> bytes:
        """Rows of one prompt stay in one part: twins, and other answers to it."""
        return drawing_key(item.prompt)

    def render(self, item: Preference, counts: SourceReport) -> list[Rendered]:
        """A text for each answer."""
        system = self._system(item)
        return [
            self.template.render_row(item.conversation(answer, system)) for answer in range(len(item.answers))
        ]

    def tokenize(self, rendered: list[tuple[Preference, list[Rendered]]]) -> list[list[TokenizedComparison]]:
        sequences = iter(self._sequences.make_samples([text for _, texts in rendered for text in texts]))
        return [[_comparison(item, list(islice(sequences, len(texts))))] for item, texts in rendered]

    def fit(
        self, item: Preference, piece: TokenizedComparison, weight: float, counts: SourceReport
    ) -> Iterable[TokenizedComparison]:
        """The row whole, with its prompt cut, or none: an answer is never cut."""
        limit, longest = self.data.max_length, max(len(tokens) for tokens, _ in piece.samples)
        counts.longest = max(counts.longest, longest)
        if longest > limit:
            counts.too_long += 1
            if self.data.too_long == "error":
                raise UserError(
                    f"{item.origin}: {longest:,} tokens, more than max_length {limit:,}; raise max_length, shorten "
                    'the row, or set too_long="drop" or "cut"'
                )
            if self.data.too_long == "drop":
                counts.dropped_too_long += 1
                return
            head = self._head(item)
            if min(piece.starts) - head < longest - limit:  # cutting all of the prompt would not do
                counts.cut_to_nothing += 1
                return
            counts.cut += 1
            piece = _cut_prompt(piece, head, longest - limit)
        counts.kept += 1
        for _, weights in piece.samples:
            self.weigh(weights, item.weight * weight)
        yield replace(piece, weight=item.weight * weight)

    def weigh(self, weights: np.ndarray, weight: float) -> None:
        """Turn the weights of an answer's sequence into its loss weights, in place. weight: the row's."""
        weights[:] = 0
        weights[-1] = weight  # the score is read at the last token

    def finish(self) -> tuple[dict[str, RankedPart], DataReport]:
        parts, report = super().finish()
        report.notes += [f"{count:,} rows {remark}" for remark, count in self._remarks.items()]
        return parts, report

    def _system(self, item: Preference) -> str | None:
        return self._conditions.prompt(item.condition, drawing_key(item.prompt), item.origin)

    def _head(self, item: Preference) -> int:
        """Number of tokens before the text of the first turn other than a system turn: the part that is never cut.

        It is searched for in the whole text, since some families write the system text inside the first user turn.
        """
        conversation = item.conversation(0, self._system(item))
        rendered, head = self.template.render(conversation), 0
        for turn in conversation.turns:
            begin = rendered.text.find(turn.content.strip(), head)
            if turn.role != "system":
                head = max(begin, head)
                break
            head = max(begin + len(turn.content.strip()), head)
        after_head = replace(rendered, spans=[(head, len(rendered.text), 1.0)])
        (_, weights), *_ = tokenize([after_head], self.tokenizer)
        return int(weights.argmax())


class ComparisonBuilder(RankedBuilder[Comparisons]):
    """Builds comparisons from preferences."""

    def collector(self) -> ComparisonCollector:
        return ComparisonCollector(tuple(self._conditions.wordings), self.data.ties == "half")


def _comparison(item: Preference, sequences: list[tuple[Sample, int]]) -> TokenizedComparison:
    # sorted, so that twins, which rank the same answers in opposite orders, get the same number
    answers: list[object] = [*sorted(map(repr, map(plain_turns, item.answers)))]
    twin = hash_values([plain_turns(item.prompt), answers])
    return TokenizedComparison(
        samples=[sample for sample, _ in sequences],
        starts=[start for _, start in sequences],
        ranks=item.ranks,
        margin=item.margin,
        weight=item.weight,
        condition=item.condition,
        twin=int.from_bytes(twin[:8], "big") >> 1,  # 63 bits, to fit int64
    )


def _cut_prompt(row: TokenizedComparison, head: int, count: int) -> TokenizedComparison:
    """The row without the first `count` tokens of each prompt after its head of so many tokens."""

    def cut(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array[:head], array[head + count :]])

    samples = [(cut(tokens), cut(weights)) for tokens, weights in row.samples]
    starts = [start - count for start in row.starts]
    return replace(row, samples=samples, starts=starts, cut=True)


def _unused_tokens(tokenizer: Tokenizer) -> str:
    """A suggestion of reward tokens: a few whose names say that they are unused."""
    names = [name for name in tokenizer.get_vocab() if "unused" in name.lower() or "reserved" in name.lower()]
    return f", such as {', '.join(sorted(names)[:2])}" if names else ", such as its end-of-text token"
