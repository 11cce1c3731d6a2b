"""Preference rows as DPO's pairs: the tokens of a prompt, the chosen and the rejected answer.

Rows are read, rendered, fitted to max_length and held out as for a reward model, so that both train on the same rows.
But a policy gets no condition and no reward token, and its pairs have neither weight nor margin.
"""

from collections.abc import Callable, Iterator

import numpy as np

from tuner.config.data import Preferences, Source
from tuner.data.comparisons import ComparisonCollector, Comparisons
from tuner.data.conditions import Conditions
from tuner.data.conversation import Preference
from tuner.data.data_report import DataReport
from tuner.data.dataset import Dataset, Progress, SkipReason, build
from tuner.data.encoding import Tokenizer
from tuner.data.examples import Examples, tokenize
from tuner.data.load_preferences import RankedBuilder, RankedPart
from tuner.data.sources import Row
from tuner.data.template import Template
from tuner.errors import UserError

Pair = dict[str, np.ndarray]
"""`prompt_ids`, `chosen_ids` and `rejected_ids`, int32, under TRL's names; answers end with their end-of-turn token.
`chosen_learned` and `rejected_learned`, bool, of an answer's tokens: whether the loss is taken on them. It is taken on
the assistant's turns, as in SFT: not on what tools return and users say in an answer of several turns."""


def load_pairs(
    data: Preferences, tokenizer: Tokenizer, *, progress: Progress | None = None
) -> Dataset[Comparisons]:
    """The comparisons of a config's data for a policy; from the cache when nothing that decides them has changed.

    The report's notes count the conditions and margins that are ignored. Raises UserError with `file:line` for every
    kind of bad row, and for a weight other than 1 (0 switches a row off).
    """
    parts, report, fingerprint = build(PairBuilder(data, tokenizer, progress))
    return Dataset(parts["train"], parts.get("validation"), parts.get("test"), report, fingerprint)


def pairs(comparisons: Comparisons, suffix: np.ndarray) -> Iterator[Pair]:
    """Every pair of every row, in order. suffix: from `answer_suffix`, removed from the end of answers.

    Prompt and answer together are the tokens of the whole conversation, encoded as one text. Where the tokenizer
    merges the end of the prompt into the answer's first token, that token belongs to the answer.
    """
    sequences = comparisons.sequences
    for better, worse in zip(*pair_sequences(comparisons), strict=True):
        chosen, rejected = (
            remove_suffix(sequences.example(int(sequence))[0], suffix) for sequence in (better, worse)
        )
        chosen_learned, rejected_learned = (
            learned_tokens(sequences, int(sequence), int(comparisons.starts[sequence]))
            for sequence in (better, worse)
        )
        start = int(min(comparisons.starts[better], comparisons.starts[worse]))
        differences = np.flatnonzero(chosen[:start] != rejected[:start])
        start = int(differences[0]) if len(differences) else start
        yield {
            "prompt_ids": chosen[:start],
            "chosen_ids": chosen[start:],
            "rejected_ids": rejected[start:],
            "chosen_learned": chosen_learned[start : len(chosen)],
            "rejected_learned": rejected_learned[start : len(rejected)],
        }


def learned_tokens(sequences: Examples, index: int, start: int) -> np.ndarray:
    """bool [t]: where the loss of a sequence is taken if its answer begins at or before `start`.

    Tokens before `start` that differ between two answers hold the beginning of one, so they are learned, too.
    """
    learned = sequences.example(index)[1] > 0
    learned[:start] = True
    # an answer without a token of its own is nothing but its last
    return learned if learned[start:].any() else np.ones_like(learned)


def pair_sequences(comparisons: Comparisons) -> tuple[np.ndarray, np.ndarray]:
    """(better, worse), each int64 [P]: indices of the sequences of every pair's answers."""
    first = np.repeat(comparisons.offsets[:-1], np.diff(comparisons.pair_offsets))
    return first + comparisons.better, first + comparisons.worse


def answer_suffix(template: Template, tokenizer: Tokenizer) -> np.ndarray:
    """int32: the tokens a template writes after an answer that no loss is taken on, such as a line break."""
    tokens, weights = tokenize([template.render(template.example)], tokenizer)[0]
    return tokens[np.flatnonzero(weights)[-1] + 1 :]


def remove_suffix(tokens: np.ndarray, suffix: np.ndarray) -> np.ndarray:
    """The tokens without this end, if they have it."""
    end = len(tokens) - len(suffix)
    return tokens[:end] if np.array_equal(tokens[end:], suffix) else tokens


class PolicyBuilder(RankedBuilder[RankedPart]):
    """Reads preferences without conditions and reward tokens, and counts the conditions and margins of the rows."""

    purpose: str
    """What the rows are for: their entry in the cache is no other's."""

    def weigh(self, weights: np.ndarray, weight: float) -> None:
        """Leave the weights of SFT, 1 in the assistant's turns: TRL weighs every row alike."""

    def __init__(self, data: Preferences, tokenizer: Tokenizer, progress: Progress | None = None):
        super().__init__(data, tokenizer, Conditions({}), None, progress=progress)
        self.template.check_answers_end()
        # a reward model without conditions and reward token has the same tokens, but neither these notes nor
        # the check of weights: its entry must not be taken
        self.cache_inputs = {**self.cache_inputs, "for": self.purpose}
        self._ignored = {"a condition": 0, "a margin": 0}

    def read(self, source: Source) -> Callable[[Row], Preference | SkipReason]:
        read = super().read(source)

        def read_pair(row: Row) -> Preference | SkipReason:
            preference = read(row)
            if isinstance(preference, Preference) and preference.weight:
                if preference.weight != 1:
                    raise UserError(
                        f'{row.origin}: "weight" is {preference.weight:g}, and TRL weighs every row alike; '
                        "leave it out, or write 0 to switch the row off"
                    )
                self._ignored["a condition"] += preference.condition is not None
                self._ignored["a margin"] += preference.margin > 0
            return preference

        return read_pair

    def finish(self) -> tuple[dict[str, RankedPart], DataReport]:
        parts, report = super().finish()
        report.notes += [
            f"{count:,} rows have {field}, which a policy is not given"
            for field, count in self._ignored.items()
            if count
        ]
        return parts, report

    def _system(self, item: Preference) -> str | None:
        return None


class PairBuilder(PolicyBuilder[Comparisons]):
    """Builds comparisons for a policy."""

    purpose = "a policy"

    def collector(self) -> ComparisonCollector:
        return ComparisonCollector((), self.data.ties == "half")

    def finish(self) -> tuple[dict[str, Comparisons], DataReport]:
        parts, report = super().finish()
        if contradictions := _count_contradictions(parts["train"]):
            report.notes.append(
                f"{contradictions:,} rows to train on prefer what another one rejects: without conditions they "
                "contradict each other; keep those of one side"
            )
        return parts, report


def _count_contradictions(rows: Comparisons) -> int:
    """Number of rows whose answers another row ranks the other way round."""
    best_answers: dict[int, set[bytes]] = {}
    twins: list[int] = rows.twins.tolist()
    for index, twin in enumerate(twins):
        best = rows.sequences.example(int(rows.offsets[index]))[0]
        best_answers.setdefault(twin, set()).add(best.tobytes())
    return sum(len(best_answers[twin]) > 1 for twin in twins)
