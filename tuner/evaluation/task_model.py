"""A model that tasks are put to: log-likelihoods of continuations in packed passes, and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tuner.config import Model
from tuner.data.batch import make_batch, pack_all
from tuner.data.conversation import Conversation
from tuner.data.encoding import adds_bos
from tuner.data.examples import Sample, tokenize
from tuner.data.rendered import Rendered, encode
from tuner.data.template import Template
from tuner.models.answer_end import StopTexts
from tuner.models.arithmetic import Precision, autocast
from tuner.models.chat import answer_ends, end_ids
from tuner.models.forward import greedy_logprobs
from tuner.models.generate import generate
from tuner.models.load import Loaded, load_model
from tuner.models.positions import Positions

TOKENS_PER_PASS = 16_384


@dataclass(frozen=True)
class TaskModel:
    """A loaded model, and how it reads tasks."""

    loaded: Loaded
    template: Template | None
    """None: prompts are plain text, put before their continuations as they are."""
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    tokens_per_pass: int = TOKENS_PER_PASS
    cut: list[int] = field(default_factory=list[int])
    """Lengths, in tokens, of the rows that lost their beginning, since they are longer than the model was trained
    for."""
    curbed: dict[int, int] = field(default_factory=dict[int, int])
    """Most tokens of an answer that were asked for -> those that were generated, where these are fewer."""

    def logprobs(self, samples: Sequence[Sample]) -> list[tuple[float, bool]]:
        """Of each sample's weighted tokens: their summed log-probability (nats), and whether greedy decoding would
        write them."""
        if not samples:
            return []
        samples = [self._cut_sample(sample) for sample in samples]
        results: dict[int, tuple[float, bool]] = {}
        for rows in pack_all(np.array([len(tokens) for tokens, _ in samples]), self.tokens_per_pass):
            batch = make_batch([samples[row] for row in rows])
            with self._autocast():
                logprobs_N, greedy_N = greedy_logprobs(self.loaded.model, batch.to(self._device))
            segment_N = np.searchsorted(batch.borders, batch.learned_N.numpy(), side="right") - 1
            # in fp64: a long continuation's sum would round in fp32
            sums = np.bincount(segment_N, logprobs_N.double().cpu().numpy(), len(rows))
            misses = np.bincount(segment_N, ~greedy_N.cpu().numpy(), len(rows))
            results |= {row: (float(sums[place]), not misses[place]) for place, row in enumerate(rows)}
        return [results[row] for row in range(len(samples))]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        *,
        special_tokens: bool = False,
    ) -> list[str]:
        """The greedy answers to prompts, without their end token, and up to the first of the stop texts.

        Prompt and answer have the length that the model was trained for. The answer has at most half of it, so that a
        question is never cut for room that an answer seldom takes. special_tokens: leave the other special tokens in
        the text.
        """
        if not prompts:
            return []
        if max_new_tokens > (most := max(1, self.max_length // 2)):
            self.curbed[max_new_tokens] = most
            max_new_tokens = most
        room = max(1, self.max_length - max_new_tokens)
        self.cut.extend(len(prompt) for prompt in prompts if len(prompt) > room)
        answers = generate(
            self.loaded.model,
            [prompt[-room:] for prompt in prompts],
            max_new_tokens=max_new_tokens,
            end_ids=self.end_ids,
            stop=StopTexts(self.loaded.tokenizer, stop) if stop else None,
            tokens_per_pass=self.tokens_per_pass,
        )
        if special_tokens:
            return [answer.text(self._tokenizer) for answer in answers]
        texts = [
            self._tokenizer.decode(answer.content.tolist(), skip_special_tokens=True) for answer in answers
        ]
        return [_up_to(text, stop) for text in texts]

    def prompt_text(self, conversation: Conversation) -> Rendered:
        """The text that the model answers: as its template writes it, or the turns' texts alone."""
        if self.template is not None:
            return self.template.render_header(conversation)
        return Rendered("\n\n".join(turn.content for turn in conversation.turns), origin=conversation.origin)

    def encode(self, text: Rendered) -> list[int]:
        """Token ids of a text; of plain text with the BOS token, where the tokenizer puts it before texts."""
        return [*self._bos(text.text), *encode(self._tokenizer, [text])[0]]

    def continuation(self, context: Rendered, continuation: str) -> Sample:
        """A context and its continuation encoded as one text, the weight on the tokens that begin in the latter.

        White space at the end of plain text begins the continuation, since tokens begin with it. That of a template,
        such as ChatML's line break behind the header of an answer, belongs to the context: no model ever chose it.
        """
        text = context.text + continuation
        begins = len(context.text if self.template is not None else context.text.rstrip())
        span = (begins, len(text), 1.0)
        tokens, weights = tokenize([replace(context, text=text, spans=[span])], self._tokenizer)[0]
        begin = self._bos(text)
        tokens = np.concatenate([np.array(begin, np.int32), tokens])
        weights = np.concatenate([np.zeros(len(begin), np.float32), weights])
        return tokens, weights

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest row that the model was trained for."""
        positions = Positions.of(self.loaded.transformer)
        return positions.trained or positions.limit or 2**31

    @property
    def _tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def _device(self) -> torch.device:
        return self.loaded.transformer.device

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self._device, self.loaded.precision)

    def _bos(self, text: str) -> list[int]:
        """BOS before plain text; chat templates write their own."""
        tokenizer = self._tokenizer
        if self.template is not None or not adds_bos(tokenizer) or text.startswith(tokenizer.bos_token):
            return []
        return [tokenizer.bos_token_id]

    def _cut_sample(self, sample: Sample) -> Sample:
        tokens, weights = sample
        if len(tokens) <= self.max_length:
            return sample
        self.cut.append(len(tokens))
        return tokens[-self.max_length :], weights[-self.max_length :]


def _up_to(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    return min((text.partition(end)[0] for end in stop), key=len, default=text)


def open_task_model(
    model: Model,
    precision: Precision,
    *,
    chat_template: str | None,
    plain: bool = False,
    device: torch.device | None = None,
) -> TaskModel:
    """Load a model to put tasks to. chat_template: text of the one to use where the model has none. plain: use none.

    Raises UserError where the model is missing, or is a reward model.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(model, precision=precision, device=device, train=False)
    tokenizer: Any = loaded.tokenizer
    tokenizer.chat_template = getattr(tokenizer, "chat_template", None) or chat_template
    if plain or not tokenizer.chat_template:
        return TaskModel(loaded, None, answer_ends(loaded))
    template = Template("tokenizer", tokenizer)
    return TaskModel(loaded, template, end_ids(template, tokenizer) | answer_ends(loaded))
