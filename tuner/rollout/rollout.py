"""A rollout: the answers to a step's prompts, and the packed rows they are trained on.

Shapes: A answers of the rollout, S answers of a row, T tokens of a row, N answer tokens among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tuner.data.batch import Batch, make_batch
from tuner.data.conversation import Prompt
from tuner.data.packing import deal, pack
from tuner.data.prompts import PromptSet
from tuner.models.generate import Answer
from tuner.rollout.engine import Engine
from tuner.training.devices import Devices
from tuner.training.watchers import Sample


@dataclass(frozen=True, eq=False)
class Rollout:
    """A step's answers, each with its prompt; the same on every rank."""

    prompts: Sequence[Prompt]
    """The prompt of each answer: one that is answered several times stands here as often, in a row."""
    tokens: Sequence[np.ndarray]
    """Token ids of each answer's prompt, with the header of the answer, int32."""
    answers: Sequence[Answer]
    texts: Sequence[str]
    """The answers as text, as reward models and rules read them."""
    answers_per_prompt: int = 1
    """Answers a to a + answers_per_prompt belong to one prompt."""

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def num_prompts(self) -> int:
        return len(self) // self.answers_per_prompt

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt with its answer, int64 [A]."""
        return np.array([len(prompt) for prompt in self.tokens], dtype=np.int64) + self.answer_lengths

    @property
    def answer_lengths(self) -> np.ndarray:
        """Tokens of each answer, int64 [A]."""
        return np.array([len(answer.tokens) for answer in self.answers], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts and answers."""
        return int(self.lengths.sum())

    @property
    def ended(self) -> np.ndarray:
        """Whether each answer ended by itself, bool [A]."""
        return np.array([answer.ended for answer in self.answers], dtype=bool)

    def sample(self, index: int, tokenizer: PreTrainedTokenizerBase) -> Sample:
        """An answer to look at, beside the one in its row."""
        prompt = self.prompts[index]
        text: str = tokenizer.decode(self.tokens[index].tolist())  # type: ignore[assignment]
        return Sample(text, self.texts[index], prompt.reference or "", None, prompt.condition)

    def mini_batches(self, count: int) -> list[np.ndarray]:
        """Numbers of the answers in `count` parts, in their order; each makes one optimizer step."""
        return [part for part in np.array_split(np.arange(len(self)), count) if len(part)]

    def rows(self, mini_batches: int, tokens_per_pass: int, devices: Devices) -> list[Row]:
        """This rank's packed rows: every mini-batch packed by itself, and its rows dealt to the ranks."""
        rows = []
        for number, part in enumerate(self.mini_batches(mini_batches)):
            lengths = self.lengths[part]
            groups = pack(lengths.tolist(), tokens_per_pass)
            groups.sort(key=lambda group, lengths=lengths: -int(lengths[group].sum()))
            own = deal(groups, devices.rank, devices.world)
            rows += [self._row(number, part[group], devices.device) for group in own]
        return rows

    def _row(self, mini_batch: int, chosen: np.ndarray, device: torch.device) -> Row:
        batch = make_batch([self._sample(index) for index in chosen.tolist()])
        borders = np.cumsum([0, *self.answer_lengths[chosen]])
        return Row(mini_batch, chosen, batch.to(device), tuple(borders.tolist()))

    def _sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a prompt and its answer, and weights: 1 for the answer's."""
        prompt, answer = self.tokens[index], self.answers[index].tokens
        weights = np.zeros(len(prompt) + len(answer), dtype=np.float32)
        weights[len(prompt) :] = 1.0
        return np.concatenate([prompt, answer]), weights


@dataclass(frozen=True, eq=False)
class Row:
    """Some answers with their prompts, packed for one pass; the loss is taken on the answers' tokens."""

    mini_batch: int
    answers: np.ndarray
    """Their numbers in the rollout, int64 [S]."""
    batch: Batch
    borders: tuple[int, ...]
    """Where answers begin and end among the row's N answer tokens: S + 1 offsets."""


def answer_prompts(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    chosen: np.ndarray,
    *,
    answers_per_prompt: int = 1,
    step: int,
) -> Rollout:
    """Have the chosen prompts answered, each `answers_per_prompt` times; the same rollout on every rank."""
    numbers = np.repeat(chosen, answers_per_prompt).tolist()
    tokens = [prompts.tokens(number) for number in numbers]
    answers = engine.generate(tokens, step=step)
    texts = [answer.text(tokenizer) for answer in answers]
    return Rollout([prompts.prompt(number) for number in numbers], tokens, answers, texts, answers_per_prompt)
