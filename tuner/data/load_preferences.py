"""From a config's sources to tokenised comparisons: read, condition, render, tokenise, hold out, count, and cache."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from tuner.config.data import Preferences, Source
from tuner.data.comparisons import Compared, ComparisonCollector, Comparisons
from tuner.data.conditions import Conditions, drawing_key
from tuner.data.conversation import Preference
from tuner.data.data_report import SourceReport
from tuner.data.dataset import Builder, Dataset, Progress, Unused, build
from tuner.data.encoding import Tokenizer, is_one_token
from tuner.data.examples import Sample, tokenize
from tuner.data.preference_rows import IncomparableError, preference_reader
from tuner.data.sources import Row
from tuner.data.split import PartName, hash_of, said_by
from tuner.data.template import Rendered, Template
from tuner.errors import UserError


def load_preferences(
    data: Preferences,
    tokenizer: Tokenizer,
    conditions: Conditions,
    reward_token: str | None,
    *,
    progress: Progress | None = None,
) -> Dataset[Comparisons]:
    """The comparisons of a config's data, from the cache when nothing they are made from has changed.

    Raises UserError with `file:line` for every kind of bad row, an unknown condition, and a reward token that the
    tokenizer splits.
    """
    parts, report, fingerprint = build(
        ComparisonBuilder(data, tokenizer, conditions, reward_token, progress=progress)
    )
    report.notes += [
        f"No row is of condition {name!r}"
        for name in conditions.wordings
        if not any(name in part.conditions for part in report.parts.values())
    ]
    return Dataset(parts["train"], parts.get("validation"), parts.get("test"), report, fingerprint)


def load_test_preferences(
    data: Preferences, tokenizer: Tokenizer, conditions: Conditions, reward_token: str | None
) -> Comparisons | None:
    """The test part alone, asked about as `conditions` says; None when no row is in it."""
    builder = ComparisonBuilder(data, tokenizer, conditions, reward_token, wanted=("test",))
    return build(builder)[0].get("test")


class SequenceMaker:
    """What a reward model reads: conversations in the template of the data, ended by the reward token."""

    def __init__(self, tokenizer: Tokenizer, reward_token: str | None) -> None:
        """Raises UserError when the reward token is not one of the tokenizer's."""
        self._tokenizer = tokenizer
        if reward_token is not None and not is_one_token(tokenizer, reward_token):
            raise UserError(
                f"reward_token {reward_token!r} is no token of this model's; name an unused one of its own"
                f"{_unused(tokenizer)}"
            )
        end = [] if reward_token is None else [tokenizer.convert_tokens_to_ids(reward_token)]
        self._end = np.array(end, dtype=np.int32)

    def make(self, rendered: list[Rendered]) -> list[tuple[np.ndarray, int]]:
        """(tokens, where the first learned span begins: the answer) of rendered conversations."""
        made = []
        for tokens, weights in tokenize(rendered, self._tokenizer):
            learned = weights.nonzero()[0]
            ended = np.concatenate([tokens, self._end])  # as text it could melt into what precedes
            made.append((ended, int(learned[0]) if len(learned) else len(ended) - 1))
        return made


class ComparisonBuilder(Builder[Preference, Compared, Comparisons]):
    """Preferences to comparisons."""

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
        self._conditions = conditions
        super().__init__(data, tokenizer, progress)
        self._sequences = SequenceMaker(tokenizer, reward_token)
        self.wanted = wanted or self.wanted
        self.made_from: Mapping[str, Any] = {
            "conditions": asdict(conditions),
            "reward_token": reward_token,
            "wanted": self.wanted,
        }

    def collector(self) -> ComparisonCollector:
        return ComparisonCollector(tuple(self._conditions.wordings), self.data.ties == "half")

    def read(self, source: Source) -> Callable[[Row], Preference | Unused]:
        reader = preference_reader(source.shape if isinstance(source.shape, str) else None)

        def read(row: Row) -> Preference | Unused:
            try:
                preference: Preference = reader.read(row.values, row.origin)
            except IncomparableError:
                if self.data.incomparable == "error":
                    raise
                return "incomparable"
            if preference.ranks[-1] == 0 and self.data.ties == "drop":
                return "ties"
            return preference if preference.condition else replace(preference, condition=source.condition)

        return read

    def part_key(self, item: Preference, content: bytes) -> bytes:
        """Rows of one prompt stay together: twins, and other answers to it."""
        return drawing_key(item.prompt)

    def tokenize(self, items: list[Preference]) -> list[Compared]:
        rendered, places = [], [0]
        for item in items:
            system = self._system(item)
            rendered += [
                self.template.render(item.conversation(answer, system)) for answer in range(len(item.answers))
            ]
            places.append(len(rendered))
        made = self._sequences.make(rendered)
        return [
            _compared(item, made[begin:end])
            for item, begin, end in zip(items, places, places[1:], strict=False)
        ]

    def fit(
        self, item: Preference, piece: Compared, weight: float, counts: SourceReport
    ) -> Iterable[Compared]:
        """The row whole, with its prompt cut, or not at all."""
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
            if min(piece.starts) - head < longest - limit:  # an answer would have to be cut as well
                counts.cut_to_nothing += 1
                return
            counts.cut += 1
            piece = _without(piece, head, longest - limit)
        counts.kept += 1
        for _, weights in piece.samples:
            weights[-1] = item.weight * weight  # read there and nowhere else
        yield replace(piece, weight=item.weight * weight)

    def _system(self, item: Preference) -> str | None:
        return self._conditions.prompt(item.condition, drawing_key(item.prompt), item.origin)

    def _head(self, item: Preference) -> int:
        """Tokens before the first text that is no system turn's: what is never cut.

        Found in the whole, for some families write the system text inside the first user turn.
        """
        conversation = item.conversation(0, self._system(item))
        text, head = self.template.render(conversation).text, 0
        for turn in conversation.turns:
            found = text.find(turn.content.strip(), head)
            if turn.role != "system":
                head = max(found, head)
                break
            head = max(found + len(turn.content.strip()), head)
        (_, behind), *_ = tokenize([Rendered(text, [(head, len(text), 1.0)], item.origin)], self.tokenizer)
        return int(behind.argmax())


def _compared(item: Preference, made: list[tuple[np.ndarray, int]]) -> Compared:
    samples: list[Sample] = [(tokens, np.zeros(len(tokens), dtype=np.float32)) for tokens, _ in made]
    answers = sorted(map(repr, map(said_by, item.answers)))
    twin = hash_of([said_by(item.prompt), answers])
    return Compared(
        samples=samples,
        starts=[start for _, start in made],
        ranks=item.ranks,
        margin=item.margin,
        weight=item.weight,
        condition=item.condition,
        twin=int.from_bytes(twin[:8], "big") >> 1,
    )


def _without(row: Compared, head: int, count: int) -> Compared:
    """The row without the first `count` tokens of each prompt behind its head."""
    samples = [
        tuple(np.concatenate([part[:head], part[head + count :]]) for part in sample)
        for sample in row.samples
    ]
    starts = [start - count for start in row.starts]
    return replace(row, samples=samples, starts=starts, cut=True)


def _unused(tokenizer: Tokenizer) -> str:
    """A few tokens of the vocabulary that their names tell to be free, to be written instead."""
    names = [name for name in tokenizer.get_vocab() if "unused" in name.lower() or "reserved" in name.lower()]
    return f", such as {', '.join(sorted(names)[:2])}" if names else ", such as its end-of-text token"
