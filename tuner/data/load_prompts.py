"""From a config's sources to tokenised prompts: read, check, render, tokenise, hold out, count, and cache."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tuner.config.data import Prompts, Source
from tuner.data.conditions import drawing_key
from tuner.data.conversation import Prompt
from tuner.data.data_report import DataReport, SourceReport
from tuner.data.dataset import Builder, Dataset, Progress, Unused, build
from tuner.data.encoding import Tokenizer, encode
from tuner.data.prompt_rows import prompt_reader
from tuner.data.prompts import PromptCollector, PromptSet
from tuner.data.sources import Row
from tuner.data.template import Template
from tuner.errors import UserError

Asked = tuple[np.ndarray, Prompt]
"""Tokens of a prompt with the header of the answer, and the prompt."""


@dataclass(frozen=True)
class RewardReader:
    """What a reward model can be asked."""

    conditions: tuple[str, ...]
    """Names of those it was trained with."""
    template: Template
    """Its own."""

    def check(self, prompt: Prompt) -> None:
        """UserError where its score of an answer to this prompt could not be asked for."""
        name = prompt.condition
        if name is not None and name not in self.conditions:
            known = ", ".join(sorted(self.conditions)) or "none"
            raise UserError(
                f"{prompt.origin}: condition {name!r} is unknown to the reward model, which has: {known}; correct it, "
                "or train the reward model on it"
            )
        answered = prompt.answered("-")
        try:
            self.template.prompt_text(answered if name is None else answered.behind("-"))
        except UserError as error:
            raise UserError(
                f"{error}; the reward model is to score answers to this prompt in its own template: leave the row "
                "out, or train the reward model with a template that takes it"
            ) from error


def load_prompts(
    prompts: Prompts,
    tokenizer: Tokenizer,
    reader: RewardReader | None,
    *,
    progress: Progress | None = None,
) -> Dataset[PromptSet]:
    """The prompts of a config, from the cache when nothing they are made from has changed; train and test parts.

    reader: whom the answers' scores are asked of; None: not known yet, so that it is not checked. Raises UserError
    with `file:line` for every kind of bad row and one the reward model cannot be asked about, and when no prompt is
    left.
    """
    parts, report, fingerprint = build(PromptBuilder(prompts, tokenizer, reader, progress))
    return Dataset(parts["train"], None, parts.get("test"), report, fingerprint)


class PromptBuilder(Builder[Prompt, Asked, PromptSet]):
    """Prompts to their tokens."""

    data: Prompts
    template: Template

    def __init__(
        self,
        data: Prompts,
        tokenizer: Tokenizer,
        reader: RewardReader | None,
        progress: Progress | None = None,
    ):
        super().__init__(data, tokenizer, progress)
        self._reader = reader
        self._weighed = 0
        self.made_from: Mapping[str, Any] = {
            "conditions": None if reader is None else sorted(reader.conditions),
            "reward template": None if reader is None else reader.template.source,
        }

    def collector(self) -> PromptCollector:
        return PromptCollector()

    def read(self, source: Source) -> Callable[[Row], Prompt | Unused]:
        shape = source.shape if isinstance(source.shape, str) else None
        reader = prompt_reader(shape)
        system = self.data.system if source.system is None else source.system

        def read(row: Row) -> Prompt:
            given = (
                copy.deepcopy(row.values) if reader.uses_function else row.values
            )  # functions may change it
            prompt: Prompt = reader.read(given, row.origin)
            condition = prompt.condition or source.condition
            self._weighed += prompt.weight not in (0, 1)
            values = {**row.values, "condition": condition}
            prompt = replace(prompt, condition=condition, system=system, values=values)
            if self._reader is not None:
                self._reader.check(prompt)
            return prompt

        return read

    def part_key(self, item: Prompt, content: bytes) -> bytes:
        """As the reward model's rows are held out: a prompt falls to the same part in both, at equal shares."""
        return drawing_key(item.turns)

    def tokenize(self, items: list[Prompt]) -> list[Asked]:
        texts = [self.template.prompt_text(item.asked()) for item in items]
        encoded = encode(self.tokenizer, texts)
        return [(np.array(ids, dtype=np.int32), item) for ids, item in zip(encoded, items, strict=True)]

    def fit(self, item: Prompt, piece: Asked, weight: float, counts: SourceReport) -> Iterable[Asked]:
        """The prompt whole, or not at all."""
        length = len(piece[0])
        counts.longest = max(counts.longest, length)
        if length > self.data.max_length:
            counts.too_long += 1
            counts.dropped_too_long += 1
            return
        counts.kept += 1
        yield piece

    def finish(self) -> tuple[dict[str, PromptSet], DataReport]:
        parts, report = super().finish()
        known = () if self._reader is None else self._reader.conditions
        asked = {name for part in parts.values() for name in part.condition_names}
        if without := sum(int((part.conditions < 0).sum()) for part in parts.values()) if known else 0:
            report.notes.append(
                f"{without:,} prompts have no condition, and the reward model was trained with some: what it says of "
                "answers to them means little; name one in the row or its Source"
            )
        if unasked := sorted(set(known) - asked):
            report.notes.append(f"No prompt is of condition {', '.join(map(repr, unasked))}")
        if self._weighed:
            report.notes.append(
                f"{self._weighed:,} rows have a weight, which prompts do not: each is drawn once an epoch"
            )
        return parts, report
