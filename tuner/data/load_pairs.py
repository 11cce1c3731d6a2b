"""Rows of preferences as the pairs a policy learns from: a prompt, the better and the worse answer, as tokens.

They are read, rendered, fitted to max_length and held out as a reward model's rows are, so that both learn from the
same; but a policy is given no condition and no reward token, and a pair has neither weight nor margin.
"""

from collections.abc import Callable, Iterator

import numpy as np

from tuner.config.data import Preferences, Source
from tuner.data.comparisons import Comparisons
from tuner.data.conditions import Conditions
from tuner.data.conversation import Conversation, Preference, Turn
from tuner.data.data_report import DataReport
from tuner.data.dataset import Dataset, Progress, Unused, build
from tuner.data.encoding import Tokenizer
from tuner.data.examples import tokenize
from tuner.data.load_preferences import ComparisonBuilder
from tuner.data.sources import Row
from tuner.data.template import Template
from tuner.errors import UserError

Pair = dict[str, np.ndarray]
"""`prompt_ids`, `chosen_ids` and `rejected_ids`, int32, by TRL's names; answers end with the end of their turn."""


def load_pairs(
    data: Preferences, tokenizer: Tokenizer, *, progress: Progress | None = None
) -> Dataset[Comparisons]:
    """The rows of a config's data, from the cache when nothing they are made from has changed.

    The report's notes count what is left out. Raises UserError with `file:line` for every kind of bad row, and for
    one with a weight other than 1 (0 switches a row off).
    """
    parts, report, fingerprint = build(PairBuilder(data, tokenizer, progress))
    return Dataset(parts["train"], parts.get("validation"), parts.get("test"), report, fingerprint)


def pairs(comparisons: Comparisons, tail: np.ndarray) -> Iterator[Pair]:
    """Every pair of every row, in order. tail: what `tail_of` found behind answers, to be left off.

    Prompt and answer together are the tokens of the whole conversation: where the answers' first token takes in the
    end of the prompt, the prompt is shorter.
    """
    sequences = comparisons.sequences
    for better, worse in zip(*answers_of_pairs(comparisons), strict=True):
        chosen, rejected = (_without(sequences.example(one)[0], tail) for one in (better, worse))
        start = int(min(comparisons.starts[better], comparisons.starts[worse]))
        unequal = np.flatnonzero(chosen[:start] != rejected[:start])
        start = int(unequal[0]) if len(unequal) else start
        yield {"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}


def answers_of_pairs(comparisons: Comparisons) -> tuple[np.ndarray, np.ndarray]:
    """int64 [P] twice: the sequences of the better and of the worse answer of every pair."""
    first = np.repeat(comparisons.offsets[:-1], np.diff(comparisons.pair_offsets))
    return first + comparisons.better, first + comparisons.worse


def tail_of(template: Template, tokenizer: Tokenizer) -> np.ndarray:
    """int32: the tokens that a template writes behind an answer and nobody learns, such as a line break."""
    example = Conversation((Turn("user", "a"), Turn("assistant", "b")), origin="end of an answer")
    tokens, weights = tokenize([template.render(example)], tokenizer)[0]
    return tokens[np.flatnonzero(weights)[-1] + 1 :]


def _without(tokens: np.ndarray, tail: np.ndarray) -> np.ndarray:
    kept = len(tokens) - len(tail)
    return tokens[:kept] if np.array_equal(tokens[kept:], tail) else tokens


class PairBuilder(ComparisonBuilder):
    """Preferences to comparisons without conditions and reward tokens; counts what is left out."""

    def __init__(self, data: Preferences, tokenizer: Tokenizer, progress: Progress | None = None):
        super().__init__(data, tokenizer, Conditions({}), None, progress=progress)
        self.made_from = {**self.made_from, "for": "a policy"}
        self._left_out = {"a condition": 0, "a margin": 0}

    def read(self, source: Source) -> Callable[[Row], Preference | Unused]:
        read = super().read(source)

        def read_pair(row: Row) -> Preference | Unused:
            preference = read(row)
            if isinstance(preference, Preference) and preference.weight:
                if preference.weight != 1:
                    raise UserError(
                        f'{row.origin}: "weight" is {preference.weight:g}, and TRL\'s DPO weighs every pair alike; '
                        "leave it out, or write 0 to switch the row off"
                    )
                self._left_out["a condition"] += preference.condition is not None
                self._left_out["a margin"] += preference.margin > 0
            return preference

        return read_pair

    def finish(self) -> tuple[dict[str, Comparisons], DataReport]:
        parts, report = super().finish()
        report.notes += [
            f"{count:,} rows have {what}, which a policy is not given"
            for what, count in self._left_out.items()
            if count
        ]
        if opposed := _opposed(parts["train"]):
            report.notes.append(
                f"{opposed:,} rows to train on prefer what another one rejects: without conditions they contradict "
                "each other; keep those of one side"
            )
        return parts, report

    def _system(self, item: Preference) -> str | None:
        return None


def _opposed(rows: Comparisons) -> int:
    """Rows whose two answers another row has the other way round."""
    best: dict[int, set[bytes]] = {}
    for index, twin in enumerate(rows.twins.tolist()):
        best.setdefault(twin, set()).add(rows.sequences.example(int(rows.offsets[index]))[0].tobytes())
    return sum(len(best[twin]) > 1 for twin in rows.twins.tolist())
