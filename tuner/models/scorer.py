"""Scores from a reward model: of the rows of a file, of single conversations, of rollouts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tuner.config import Model
from tuner.data.answers import read_condition, read_reference
from tuner.data.batch import make_batch, pack_all
from tuner.data.conditions import Conditions, Wordings, drawing_key
from tuner.data.conversation import Conversation, Prompt, Turn
from tuner.data.conversation_rows import conversation_reader
from tuner.data.load_preferences import SequenceMaker
from tuner.data.load_prompts import RewardReader
from tuner.data.row_shapes import Reader
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.models.arithmetic import autocast, compute_in_fp32
from tuner.models.forward import scores
from tuner.models.load import Loaded, Precision, load_model
from tuner.models.locate import Location, locate
from tuner.models.reward_record import RewardRecord, known_readings, read_reward_record
from tuner.models.tokenizer import read_tokenizer

WINDOW = 4096
"""Conversations read ahead to fill passes; bounds the memory of a stream."""


def in_turn(passes: Sequence[Sequence[int]], work: Callable[[Sequence[int]], Sequence[float]]) -> list[float]:
    """Results for the indices in some passes, by index; all passes are made here."""
    results = {
        index: result for indices in passes for index, result in zip(indices, work(indices), strict=True)
    }
    return [results[index] for index in sorted(results)]


@torch.no_grad()
def score_sequences(
    model: torch.nn.Module,
    sequences: Sequence[np.ndarray],
    tokens_per_pass: int,
    device: torch.device,
    *,
    advance: Callable[[int], None] = lambda count: None,
    by_pass: Callable[..., Sequence[float]] = in_turn,
) -> np.ndarray:
    """Score of each sequence of tokens (int32 [t]), float64 [sequences], in their order, independent of the packing.

    advance: called after each pass with the number of sequences it scored. by_pass: makes the passes, as `in_turn`
    does, perhaps in several processes; a pass may be empty.
    """

    def score_pass(indices: Sequence[int]) -> list[float]:
        rows = [(sequences[index], np.zeros(len(sequences[index]), dtype=np.float32)) for index in indices]
        scores_S = scores(model, make_batch(rows).to(device)).double().tolist()
        advance(len(indices))
        return scores_S[: len(indices)]  # an empty pass has a segment that nobody asked for

    lengths = np.array([len(tokens) for tokens in sequences], dtype=np.int64)
    passes = pack_all(lengths, tokens_per_pass) if len(sequences) else []
    return np.array(by_pass(passes, score_pass), dtype=np.float64)


@dataclass(frozen=True)
class ScoreRequest:
    """A conversation to be scored, under a condition."""

    conversation: Conversation
    condition: str | None
    prompt: Sequence[Turn]
    """The turns before the answer; they determine which wording of the condition is drawn, so that all answers to a
    prompt get the same."""

    @classmethod
    def of(cls, prompt: Prompt, answer: str, with_reference: bool = False) -> ScoreRequest:
        """A prompt with an answer to it, under the prompt's condition; see Prompt.with_answer."""
        conversation = prompt.with_answer(answer, with_reference)
        return cls(conversation, prompt.condition, conversation.turns[:-1])


@dataclass(frozen=True)
class RewardInputs:
    """From conversations to the tokens a reward model reads, with its template, conditions and reward token."""

    tokenizer: PreTrainedTokenizerBase
    record: RewardRecord
    template: Template

    @classmethod
    def of(cls, model: Model, location: Location, loaded: Loaded) -> RewardInputs:
        """The inputs of a loaded reward model, by the files in its folder.

        Raises UserError where its record or its chat template is missing.
        """
        tokenizer, template = reward_template(model, location)  # loaded.tokenizer may be the policy's
        return cls(tokenizer, read_reward_record(loaded, location.folder), template)

    @property
    def reader(self) -> RewardReader:
        """Checks prompts against what the reward model can score: its conditions and template."""
        return RewardReader(tuple(self.record.conditions), self.template)

    def make(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        """Tokens of each request, int32 [t]; the score is read at the last. Raises UserError on unknown conditions."""
        maker = SequenceMaker(self.tokenizer, self.record.reward_token)  # pyright: ignore[reportArgumentType]
        wordings = {name: Wordings(texts) for name, texts in self.record.conditions.items()}
        conditions = Conditions(wordings, self.record.seed)
        rendered = [
            self.template.render(_without_loss(_conditioned(request, conditions))) for request in requests
        ]
        return [tokens for tokens, _ in maker.make(rendered)]


@dataclass(frozen=True)
class Scorer:
    """A loaded reward model with the template and the conditions it was trained with."""

    loaded: Loaded
    record: RewardRecord
    template: Template
    device: torch.device
    tokens_per_pass: int = 16_384

    def score(
        self, rows: Iterable[Conversation | Mapping[str, Any]], condition: str | None = None
    ) -> np.ndarray:
        """Scores, float64 [rows], of conversations, or of rows of any format `tuner data` reads, in their order.

        condition: for rows without one. Raises UserError on bad rows and unknown conditions.
        """
        return np.fromiter(self.stream(rows, condition), dtype=np.float64)

    def stream(
        self, rows: Iterable[Conversation | Mapping[str, Any]], condition: str | None = None
    ) -> Iterator[float]:
        """The same as an iterator that holds at most WINDOW rows in memory."""
        reader, numbers = conversation_reader(), itertools.count(1)
        requests = (self._read(row, reader, next(numbers), condition) for row in rows)
        while window := list(itertools.islice(requests, WINDOW)):
            yield from self.score_requests(window).tolist()

    def score_requests(self, requests: Sequence[ScoreRequest]) -> np.ndarray:
        """Scores, float64 [requests]."""
        return self.score_tokens(
            RewardInputs(self.loaded.tokenizer, self.record, self.template).make(requests)
        )

    def score_tokens(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """Scores, float64 [sequences], of tokens (int32 [t]) as `RewardInputs` makes them."""
        with self._autocast():
            return score_sequences(self.loaded.model, sequences, self.tokens_per_pass, self.device)

    def _read(
        self, row: Conversation | Mapping[str, Any], reader: Reader, number: int, condition: str | None
    ) -> ScoreRequest:
        if isinstance(row, Conversation):
            return ScoreRequest(row, condition, prompt_of(row))
        conversation = reader.read(row, f"row {number}")
        if not isinstance(conversation, Conversation):
            raise UserError(f"row {number}: a text, and conversations are scored; write messages")
        if self.template.needs_reference:
            conversation = conversation.with_reference(read_reference(row, f"row {number}"))
        name = read_condition(row, f"row {number}") or condition
        return ScoreRequest(conversation, name, prompt_of(conversation))

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.loaded.precision)


def _conditioned(request: ScoreRequest, conditions: Conditions) -> Conversation:
    """The conversation behind its condition's system prompt."""
    system = conditions.prompt(request.condition, drawing_key(request.prompt), request.conversation.origin)
    return request.conversation if system is None else request.conversation.prepend_system(system)


def _without_loss(conversation: Conversation) -> Conversation:
    """No loss is taken on a score's input: locating such spans is slow, and some templates cannot."""
    return replace(conversation, turns=tuple(replace(turn, learn=False) for turn in conversation.turns))


def prompt_of(conversation: Conversation) -> Sequence[Turn]:
    """The turns before the assistant's last answer."""
    turns = conversation.turns
    last = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns))
    return turns[:last]


def reward_template(model: Model, location: Location) -> tuple[PreTrainedTokenizerBase, Template]:
    """A reward model's tokenizer and chat template; reads no weights. UserError where it has no template."""
    tokenizer = read_tokenizer(location.tokenizer_folder, trust_remote_code=model.trust_remote_code)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{model.path}: no chat template stands beside this reward model, so how it reads conversations is not "
            "known; put the chat_template.jinja it was trained with into its folder"
        )
    readings = known_readings(location.folder, tokenizer)
    return tokenizer, Template("tokenizer", tokenizer, readings)  # pyright: ignore[reportArgumentType]


def open_scorer(
    path: str | Path,
    *,
    precision: Precision | None = None,
    template: str = "tokenizer",
    device: torch.device | None = None,
    tokens_per_pass: int = 16_384,
    trust: bool = False,
) -> Scorer:
    """Load a reward model to score with: a run, a folder or a hub name.

    precision: of matrix products; None: that of its training, or of its file. trust: let the model run Python code of
    its own. Raises UserError when the model is
    missing, is no reward model, or has no chat template.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model(path=str(path), trust_remote_code=trust)
    location = locate(model, weights=False)
    if not location.has_score:
        raise UserError(f"{path}: this is no reward model: it has no scalar head; train one from it first")
    # as in training even where products are to be in fp32: weights are rounded to that precision before they
    # are quantized, so another one gives other weights
    loaded = load_model(model, precision=location.precision, device=device, train=False, head="score")
    if precision is not None:
        loaded = replace(loaded, precision=precision)
        if precision == "fp32":
            compute_in_fp32(loaded.model)
    record = read_reward_record(loaded, location.folder)
    chat_template = Template(template, loaded.tokenizer, record.readings)  # pyright: ignore[reportArgumentType]
    return Scorer(loaded, record, chat_template, device, tokens_per_pass)
