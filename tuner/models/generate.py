"""Generation: packed prompts fill a key-value cache, then every row gets one token at a time.

Shapes: B places for rows, L rows not ended, V vocabulary, M maximum number of new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuner.models import varlen
from tuner.models.answer_end import AnswerEnds, StopTexts
from tuner.models.answer_text import AnswerText
from tuner.models.decoding import Decoding
from tuner.models.kv_cache import bytes_per_token
from tuner.models.positions import check_generated_length
from tuner.models.prefill import TOKENS_PER_PASS
from tuner.models.sampling import choose, uniforms
from tuner.models.unwrap import unwrapped
from tuner.models.waiting import Waiting

__all__ = ["Answer", "generate", "stream", "uniforms", "unpacked"]

_PADDED = "sdpa"  # accepts a mask and a cache; `varlen` is for packed rows


@dataclass(frozen=True, eq=False)
class Answer:
    """A model's answer to one prompt."""

    tokens: np.ndarray
    """Its tokens, int32 [tokens], the end token included."""

    ended: bool
    """Whether its last token is an end token or completes a stop text, and it was not truncated."""

    logprobs: np.ndarray
    """Log-probability of each token at the sampling temperature, before top_p, float32 [tokens]; at temperature 1 for
    greedy decoding. As computed in generation, which rounds differently from a training pass: losses recompute them."""

    cut: int = 0
    """Characters at its end that are a stop text, and what the last token adds behind it; 0: no stop text ended it."""

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The decoded answer without its end token or stop text; a reward sees other special tokens."""
        text = str(tokenizer.decode(self.content.tolist(), skip_special_tokens=False))
        return text[: len(text) - self.cut]

    @property
    def content(self) -> np.ndarray:
        """The tokens without the end token."""
        return self.tokens[:-1] if self.ended and not self.cut else self.tokens


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_new_tokens: int = 0,
    end_ids: Collection[int],
    stop: StopTexts | None = None,
    noise: np.ndarray | None = None,
    cache_bytes: int | None = None,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> list[Answer]:
    """Generate an answer to each prompt, ended by the first token of `end_ids`, or the first stop text.

    Greedy at temperature 0; else token t of answer i is selected by noise[i, t] from the top_k most likely and their
    top_p nucleus (see `choose`; noise float64 [prompts, M], see `uniforms`). The first min_new_tokens tokens are not of
    `end_ids`, and stop texts that they complete do not count. tokens_per_pass bounds the prompt tokens of a pass,
    cache_bytes the keys and values held at a time (None: those of tokens_per_pass tokens, at least one row's): prompts
    wait until answers end that leave them room. Both affect memory and speed, and the result by
    rounding alone.
    The model's attention and training mode are restored, and the global random state is not used. Raises ValueError on
    an empty prompt, and UserError for models with layers other than attention and for lengths at which cached keys
    would be wrong (see `check_generated_length`).
    """
    _check(prompts, max_new_tokens, temperature, noise)
    lengths = [len(prompt) for prompt in prompts]
    with unpacked(model) as transformer:
        check_generated_length(transformer, max(lengths, default=0) + max_new_tokens)
        cached_tokens = tokens_per_pass
        if cache_bytes is not None:
            cached_tokens = cache_bytes // bytes_per_token(transformer)
        steps = _decode(
            Decoding(transformer, tokens_per_pass),
            prompts,
            Waiting(lengths, max_new_tokens, cached_tokens),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            ends=AnswerEnds(end_ids, stop, min_new_tokens),
            noise=noise,
        )
        return _collect(steps, len(prompts), max_new_tokens)


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    end_ids: Collection[int],
    seed: int = 0,
    shown: Collection[int] = (),
) -> Iterator[str]:
    """The answer's text, piece by piece as it is generated; joined, the pieces are the decoded answer.

    shown: special tokens that stand in the text; all others are left out.
    """
    noise = uniforms(seed, 0, [0], max_new_tokens)
    _check([prompt], max_new_tokens, temperature, noise)
    text = AnswerText(tokenizer, shown=shown)
    with unpacked(model) as transformer:
        check_generated_length(transformer, len(prompt) + max_new_tokens)
        for step in _decode(
            Decoding(transformer),
            [prompt],
            Waiting([len(prompt)], max_new_tokens, 0),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            ends=AnswerEnds(end_ids, None, 0),
            noise=noise,
        ):
            token = int(step.tokens_L[0])
            if not step.ended_L[0] or token in shown:
                yield text.push(token)
    yield text.finish()


@contextmanager
def unpacked(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers model in eval mode, with attention for padded rows, under autocast; restored afterwards."""
    transformer = unwrapped(model)
    # listed one by one: model.train() afterwards would also switch modules that were in eval mode on purpose
    training = [module for module in model.modules() if module.training]
    model.eval()  # gradient checkpointing is off in eval mode, too
    try:
        with varlen.attention(transformer, _PADDED), _autocast(transformer):
            yield transformer
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class _Step:
    """One token of every row that has not ended."""

    rows_L: np.ndarray
    """Numbers of the rows."""
    places_L: np.ndarray
    """Of the tokens in their answers."""
    tokens_L: np.ndarray
    logprobs_L: np.ndarray
    ended_L: np.ndarray
    """Whether the token ends its answer."""
    cut_L: np.ndarray
    """Characters that a stop text cuts off the answer."""


@torch.no_grad()
def _decode(
    decoding: Decoding,
    prompts: Sequence[Sequence[int]],
    waiting: Waiting,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    ends: AnswerEnds,
    noise: np.ndarray | None,
    top_k: int | None = None,
) -> Iterator[_Step]:
    """Generate token by token; rows that end make room for those that wait."""
    while max_new_tokens:
        joining = waiting.take(len(decoding.places), decoding.longest).tolist()
        if joining:
            decoding.join(joining, [prompts[row] for row in joining], [max_new_tokens] * len(joining))
        live = decoding.places
        if not len(live):
            return
        device, rows_B, counts_B = decoding.logits_BV.device, decoding.numbers_B, decoding.counts
        uniform_B = None
        if noise is not None and temperature:
            # free places, whose number is -1, take the last prompt's: their tokens are never read
            uniform_B = torch.from_numpy(noise[rows_B, counts_B]).to(device, non_blocking=True)
        tokens_B, logprobs_B = choose(
            decoding.logits_BV,
            temperature,
            top_p,
            uniform_B,
            top_k=top_k,
            forbidden=ends.forbidden(counts_B, device),
        )
        # besides that in `nucleus` the only synchronization with the device; float64 holds both exactly
        tokens, logprobs = torch.stack((tokens_B.double(), logprobs_B.double())).cpu().numpy()[:, live]
        rows_L, places_L = rows_B[live], counts_B[live]
        ended_L, cut_L = ends.of(places_L, rows_L, tokens)
        decoding.leave(live[ended_L | (places_L + 1 == max_new_tokens)])
        yield _Step(rows_L, places_L, tokens, logprobs, ended_L, cut_L)
        if len(decoding.places) or not len(waiting):
            decoding.step(tokens_B, others_follow=len(waiting) > 0)


def _collect(steps: Iterator[_Step], rows: int, max_new_tokens: int) -> list[Answer]:
    tokens = np.zeros((rows, max_new_tokens), np.int32)
    logprobs = np.zeros((rows, max_new_tokens), np.float32)
    lengths, cut, ended = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(rows, bool)
    for step in steps:
        tokens[step.rows_L, step.places_L], logprobs[step.rows_L, step.places_L] = (
            step.tokens_L,
            step.logprobs_L,
        )
        lengths[step.rows_L], ended[step.rows_L], cut[step.rows_L] = (
            step.places_L + 1,
            step.ended_L,
            step.cut_L,
        )
    return [
        # copies: a slice would keep the arrays of all rows alive
        Answer(tokens[row, :length].copy(), bool(ended[row]), logprobs[row, :length].copy(), int(cut[row]))
        for row, length in enumerate(lengths)
    ]


def _check(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, noise: np.ndarray | None
) -> None:
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("an empty prompt cannot be answered: begin it with the begin-of-sequence token")
    if temperature > 0 and (noise is None or noise.shape != (len(prompts), max_new_tokens)):
        shape = "none" if noise is None else f"{noise.shape}"
        raise ValueError(f"sampling needs noise of shape {(len(prompts), max_new_tokens)}, not {shape}")


def _autocast(model: nn.Module) -> torch.autocast | nullcontext:
    """Autocast for models with bf16 weights, whose adapters are in fp32, as in training."""
    weight = next((weight for weight in model.parameters() if weight.dtype == torch.bfloat16), None)
    return torch.autocast(weight.device.type, torch.bfloat16) if weight is not None else nullcontext()
