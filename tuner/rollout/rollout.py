"""A rollout: the answers to a step's prompts, and the packed rows the policy is trained on.

Shapes: A answers of the rollout, S answers of a row, T tokens of a row, N answer tokens among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tuner.data.batch import Batch, make_batch
from tuner.data.conversation import Prompt
from tuner.data.packing import pack
from tuner.data.prompts import PromptSet
from tuner.models.generate import Answer
from tuner.rollout.engine import Engine
from tuner.training.devices import Devices
from tuner.training.watchers import Sample


@dataclass(frozen=True, eq=False)
class Rollout:
    """A step's answers, each with its prompt; the same on every rank."""

    prompts: Sequence[Prompt]
    """The prompt of each answer; a prompt with several answers is repeated, consecutively."""
    tokens: Sequence[np.ndarray]
    """Token ids of each answer's prompt, up to and including the header of the answer, int32."""
    answers: Sequence[Answer]
    texts: Sequence[str]
    """The answers as text, as reward models and rules read them."""
    answers_per_prompt: int = 1
    """Consecutive answers that belong to one prompt."""
    masks_truncated: bool = False
    """Whether losses leave out truncated answers."""

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
        """Whether each answer ended with an end token, rather than being cut off, bool [A]."""
        return np.array([answer.ended for answer in self.answers], dtype=bool)

    @property
    def learned(self) -> np.ndarray:
        """Whether losses are taken on each answer, bool [A]."""
        return self.ended if self.masks_truncated else np.ones(len(self), dtype=bool)

    def sample(self, index: int, tokenizer: PreTrainedTokenizerBase) -> Sample:
        """One answer, with the reference answer of its row, for watchers to show."""
        prompt = self.prompts[index]
        text: str = tokenizer.decode(self.tokens[index].tolist())  # type: ignore[assignment]
        return Sample(text, self.texts[index], prompt.reference or "", None, prompt.condition)

    def mini_batches(self, count: int) -> list[np.ndarray]:
        """Indices of the answers, in order, in at most `count` parts; each makes one optimizer step."""
        # With fewer answers than mini-batches, empty parts would divide their losses by zero tokens.
        return [part for part in np.array_split(np.arange(len(self)), count) if len(part)]

    def rows(self, mini_batches: int, tokens_per_pass: int, devices: Devices) -> list[Row]:
        """This rank's packed rows. Each mini-batch is packed apart, so that a row belongs to one optimizer step."""
        rows: list[Row] = []
        for number, part in enumerate(self.mini_batches(mini_batches)):
            lengths = self.lengths[part]
            groups = pack(lengths.tolist(), tokens_per_pass)
            # Fullest first: rows are dealt in turns, and each rank gets about as much work.
            groups.sort(key=lambda group, lengths=lengths: -int(lengths[group].sum()))
            local = devices.share.of(groups)
            rows += [self._row(number, part[list(group)], devices.device) for group in local]
        return rows

    def _row(self, mini_batch: int, answers: np.ndarray, device: torch.device) -> Row:
        batch = make_batch([self._sample(index) for index in answers.tolist()])
        borders = np.cumsum([0, *self.answer_lengths[answers]])
        learned_S = self.learned[answers]
        return Row(mini_batch, answers, batch.to(device), tuple(borders.tolist()), learned_S)

    def _sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a prompt with its answer, and their loss weights: 1 on the answer, 0 on the prompt."""
        prompt, answer = self.tokens[index], self.answers[index].tokens
        weights = np.zeros(len(prompt) + len(answer), dtype=np.float32)
        weights[len(prompt) :] = 1.0
        return np.concatenate([prompt, answer]), weights


@dataclass(frozen=True, eq=False)
class Row:
    """Answers with their prompts, packed for one forward pass; the loss is taken on the answers' tokens."""

    mini_batch: int
    answers: np.ndarray
    """Their indices in the rollout, int64 [S]."""
    batch: Batch
    borders: tuple[int, ...]
    """Offsets of the answers among the row's N answer tokens: S + 1 numbers from 0 to N."""
    learned_S: np.ndarray
    """Whether losses are taken on each answer, bool [S]."""

    @property
    def learned_tokens(self) -> torch.Tensor:
        """The same for each answer token, bool [N]."""
        learned_N = np.repeat(self.learned_S, np.diff(self.borders))
        return torch.from_numpy(learned_N).to(self.batch.tokens_T.device)  # pyright: ignore[reportUnknownMemberType]

    def of_learned(self) -> Row:
        """The row with only those answers that losses are taken on; the others are still passed through the model."""
        learned_N, lengths_S = self.learned_tokens, np.diff(self.borders)[self.learned_S]
        return Row(
            self.mini_batch,
            self.answers[self.learned_S],
            replace(
                self.batch,
                learned_N=self.batch.learned_N[learned_N],
                weights_N=self.batch.weights_N[learned_N],
            ),
            tuple(np.cumsum([0, *lengths_S]).tolist()),
            self.learned_S[self.learned_S],
        )


def answer_prompts(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    indices: np.ndarray,
    *,
    answers_per_prompt: int = 1,
    masks_truncated: bool = False,
    step: int,
) -> Rollout:
    """Answer some prompts, each `answers_per_prompt` times; the rollout is the same on every rank.

    indices: of the prompts, int64. masks_truncated: losses leave truncated answers out.
    """
    # Consecutive: GRPO and RLOO take their baselines over runs of answers_per_prompt answers.
    repeated = np.repeat(indices, answers_per_prompt).tolist()
    tokens = [prompts.tokens(index) for index in repeated]
    answers = engine.generate(tokens, step=step)
    texts = [answer.text(tokenizer) for answer in answers]
    return Rollout(
        [prompts.prompt(index) for index in repeated],
        tokens,
        answers,
        texts,
        answers_per_prompt,
        masks_truncated,
    )
