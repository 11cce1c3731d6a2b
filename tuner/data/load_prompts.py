"""From a config's sources to tokenized prompts: read, check, render, tokenize, hold out, count, and cache."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tuner.config.data import Prompts, Source
from tuner.data.conditions import drawing_key
from tuner.data.conversation import Prompt
from tuner.data.data_report import DataReport, SourceReport
from tuner.data.dataset import Builder, Dataset, Progress, SkipReason, build
from tuner.data.encoding import Tokenizer
from tuner.data.lost_content import LostContentError
from tuner.data.prompt_rows import prompt_reader
from tuner.data.prompts import PromptCollector, PromptSet
from tuner.data.rendered import Rendered, encode
from tuner.data.sources import Row
from tuner.data.template import Template
from tuner.errors import UserError

TokenizedPrompt = tuple[np.ndarray, Prompt]
"""(tokens int32 [t] that end with the header of the answer, the prompt)."""


@dataclass(frozen=True)
class RewardReader:
    """What decides which prompts a reward model can read: its conditions and its chat template."""

    conditions: tuple[str, ...]
    """Names of the conditions it was trained with."""
    template: Template
    """The template it was trained with."""
    further: tuple["RewardReader", ...] = ()
    """Those of further reward models that score the same answers."""

    def check(self, prompt: Prompt) -> None:
        """Raises UserError when a reward model cannot score answers to this prompt."""
        self._check(prompt)
        for reader in self.further:
            reader.check(prompt)

    def cache_inputs(self) -> dict[str, Any]:
        """What decides which prompts pass, as plain values."""
        values: dict[str, Any] = {
            "conditions": sorted(self.conditions),
            "reward template": self.template.source,
        }
        further = [reader.cache_inputs() for reader in self.further]
        return values | ({"further reward models": further} if further else {})

    def _check(self, prompt: Prompt) -> None:
        name = prompt.condition
        if name is not None and name not in self.conditions:
            trained_with = ", ".join(sorted(self.conditions)) or "none"
            raise UserError(
                f"{prompt.origin}: condition {name!r} is unknown to the reward model, which has: {trained_with}; "
                "correct it, or train the reward model on it"
            )
        conversation = prompt.with_answer("-", self.template.needs_reference)
        try:
            self.template.prompt_text(conversation if name is None else conversation.prepend_system("-"))
        except UserError as error:
            sentence = (
                f"{error}; the reward model is to score answers to this prompt in its own template: leave the row "
                "out, or train the reward model with a template that takes it"
            )
            if isinstance(error, LostContentError):
                raise LostContentError(sentence, error.content) from error
            raise UserError(sentence) from error


def load_prompts(
    prompts: Prompts,
    tokenizer: Tokenizer,
    reader: RewardReader | None,
    *,
    progress: Progress | None = None,
) -> Dataset[PromptSet]:
    """The train and test prompts of a config; from the cache when nothing that decides them has changed.

    reader: of the reward model that will score the answers; None skips its check. Raises UserError with `file:line`
    for every kind of bad row and every prompt that the reward model cannot read, and when no prompt is left.
    """
    parts, report, fingerprint = build(PromptBuilder(prompts, tokenizer, reader, progress))
    return Dataset(parts["train"], None, parts.get("test"), report, fingerprint)


class PromptBuilder(Builder[Prompt, TokenizedPrompt, PromptSet]):
    """Builds tokenized prompts."""

    data: Prompts
    template: Template
    section = "prompts"

    def __init__(
        self,
        data: Prompts,
        tokenizer: Tokenizer,
        reader: RewardReader | None,
        progress: Progress | None = None,
    ):
        super().__init__(data, tokenizer, progress)
        self._reader = reader
        self._num_weighted = 0
        self.cache_inputs: Mapping[str, Any] = (
            {"conditions": None, "reward template": None} if reader is None else reader.cache_inputs()
        )

    def collector(self) -> PromptCollector:
        return PromptCollector()

    def read(self, source: Source) -> Callable[[Row], Prompt | SkipReason]:
        shape = source.shape if isinstance(source.shape, str) else None
        reader = prompt_reader(shape)
        system = self.data.system if source.system is None else source.system

        def read(row: Row) -> Prompt:
            # a user's function may change its argument, and rule-based rewards get the row as in its file
            values = copy.deepcopy(row.values) if reader.uses_function else row.values
            prompt: Prompt = reader.read(values, row.origin)
            condition = prompt.condition or source.condition
            self._num_weighted += prompt.weight not in (0, 1)
            values = {**row.values, "condition": condition}
            prompt = replace(prompt, condition=condition, system=system, values=values)
            if self._reader is not None:
                self._reader.check(prompt)
            return prompt

        return read

    def part_key(self, item: Prompt, content: bytes) -> bytes:
        """The key of a reward model's rows: at equal shares, a prompt is in the same part of both data."""
        return drawing_key(item.turns)

    def render(self, item: Prompt, counts: SourceReport) -> list[Rendered]:
        return [self.template.render_prompt_row(item.policy_input())]

    def tokenize(self, rendered: list[tuple[Prompt, list[Rendered]]]) -> list[list[TokenizedPrompt]]:
        encoded = encode(self.tokenizer, [text for _, texts in rendered for text in texts])
        return [
            [(np.array(ids, dtype=np.int32), item)] for ids, (item, _) in zip(encoded, rendered, strict=True)
        ]

    def fit(
        self, item: Prompt, piece: TokenizedPrompt, weight: float, counts: SourceReport
    ) -> Iterable[TokenizedPrompt]:
        """The prompt, unless it is longer than max_length: a prompt is never cut."""
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
        trained_with = () if self._reader is None else self._reader.conditions
        present = {name for part in parts.values() for name in part.condition_names}
        without = sum(int((part.conditions < 0).sum()) for part in parts.values())
        if trained_with and without:
            report.notes.append(
                f"{without:,} prompts have no condition, and the reward model was trained with some: its scores of "
                "answers to them mean little; name one in the row or its Source"
            )
        if absent := sorted(set(trained_with) - present):
            report.notes.append(f"No prompt is of condition {', '.join(map(repr, absent))}")
        if self._num_weighted:
            report.notes.append(
                f"{self._num_weighted:,} rows have a weight, and prompts are not weighted: each is drawn once an epoch"
            )
        return parts, report
