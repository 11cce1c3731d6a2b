"""Generation: packed prompts fill a key-value cache, then every row gets one token at a time.

Shapes: B rows generated together, L of them not ended, V vocabulary, M maximum number of new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuner.data.batch import Batch, make_batch
from tuner.models import varlen
from tuner.models.answer_end import AnswerEnds, StopTexts
from tuner.models.answer_text import AnswerText
from tuner.models.kv_cache import RowCache, bytes_per_token, chunks
from tuner.models.positions import check_generated_length
from tuner.models.rope import switch_length
from tuner.models.sampling import choose, uniforms
from tuner.models.unwrap import unwrapped

__all__ = ["Answer", "generate", "prefill", "rewrite_outgrown", "stream", "uniforms", "unpacked"]

TOKENS_PER_PASS = 16_384
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
    cache_bytes the keys and values held at a time (None: those of tokens_per_pass tokens), both at least one prompt's;
    they affect memory and speed, never the result.
    The model's attention and training mode are restored, and the global random state is not used. Raises ValueError on
    an empty prompt, and UserError for models with layers other than attention and for lengths at which cached keys
    would be wrong (see `check_generated_length`).
    """
    _check(prompts, max_new_tokens, temperature, noise)
    answers: dict[int, Answer] = {}
    lengths = [len(prompt) for prompt in prompts]
    with unpacked(model) as transformer:
        check_generated_length(transformer, max(lengths, default=0) + max_new_tokens)
        cached_tokens = tokens_per_pass
        if cache_bytes is not None:
            cached_tokens = cache_bytes // bytes_per_token(transformer)
        for chosen in chunks(lengths, max_new_tokens, cached_tokens):
            steps = _decode(
                transformer,
                [prompts[index] for index in chosen],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                ends=AnswerEnds(end_ids, stop, min_new_tokens),
                noise=None if noise is None else noise[chosen],
                tokens_per_pass=tokens_per_pass,
            )
            answers |= zip(chosen.tolist(), _collect(steps, len(chosen), max_new_tokens), strict=True)
    return [answers[index] for index in range(len(prompts))]


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
            transformer,
            [prompt],
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
        with _attention(transformer, _PADDED), _autocast(transformer):
            yield transformer
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class _Step:
    """One token of every row that has not ended."""

    rows_L: np.ndarray
    """Numbers of the rows."""
    tokens_L: np.ndarray
    logprobs_L: np.ndarray
    ended_L: np.ndarray
    """Whether the token ends its answer."""
    cut_L: np.ndarray
    """Characters that a stop text cuts off the answer."""


@torch.no_grad()
def _decode(
    transformer: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    ends: AnswerEnds,
    noise: np.ndarray | None,
    top_k: int | None = None,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> Iterator[_Step]:
    """Generate for all prompts at once, token by token.

    Ended rows are dropped once they are half of all, and not one by one: dropping copies the cache.
    """
    device, lengths = transformer.device, [len(prompt) for prompt in prompts]
    cache = RowCache(transformer, lengths, max_new_tokens)
    logits_BV = prefill(transformer, prompts, cache, tokens_per_pass)
    texts = [list(prompt) for prompt in prompts]
    rows_B, live_B = np.arange(len(prompts)), np.ones(len(prompts), bool)
    positions_B1 = torch.tensor(lengths, device=device)[:, None]
    noise_BM = None if noise is None or temperature == 0 else torch.from_numpy(noise).to(device)
    for place in range(max_new_tokens):
        uniform_B = None if noise_BM is None else noise_BM[:, place]
        tokens_B, logprobs_B = choose(
            logits_BV, temperature, top_p, uniform_B, top_k=top_k, forbidden=ends.forbidden(place, device)
        )
        # besides that in `nucleus` the only synchronization with the device; float64 holds both exactly
        tokens, logprobs = torch.stack((tokens_B.double(), logprobs_B.double())).cpu().numpy()
        for row, token in zip(rows_B, tokens, strict=True):
            texts[row].append(int(token))
        ended_L, cut_L = ends.of(place, rows_B[live_B], tokens[live_B])
        yield _Step(rows_B[live_B], tokens[live_B], logprobs[live_B], ended_L, cut_L)
        live_B[live_B] = ~ended_L
        if place + 1 == max_new_tokens or not live_B.any():
            return
        if cache.is_full or 2 * live_B.sum() <= len(live_B):
            remaining_B = cache.keep(np.flatnonzero(live_B))
            rows_B, live_B = rows_B[live_B], live_B[live_B]
            tokens_B, positions_B1 = tokens_B[remaining_B], positions_B1[remaining_B]
            noise_BM = None if noise_BM is None else noise_BM[remaining_B]
        rewrite_outgrown(transformer, cache, [texts[row] for row in rows_B], live_B, tokens_per_pass)
        logits_BV = _next_logits(transformer, tokens_B, positions_B1, cache)
        positions_B1 = positions_B1 + 1


def _next_logits(
    transformer: PreTrainedModel, tokens_B: torch.Tensor, positions_B1: torch.Tensor, cache: RowCache
) -> torch.Tensor:
    """Logits [B, V] behind a token of each row, whose keys and values the cache takes up."""
    logits_BV = transformer(
        input_ids=tokens_B[:, None],
        attention_mask=cache.mask,
        position_ids=positions_B1,
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1]
    cache.advance()
    return logits_BV


def rewrite_outgrown(
    transformer: PreTrainedModel,
    cache: RowCache,
    rows: Sequence[Sequence[int]],
    live_B: np.ndarray,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> None:
    """Write the keys of rows anew whose last token makes them too long for the short set of LongRoPE's frequencies.

    As LongRoPE2 does (arXiv 2502.20082): each token is then predicted as by a pass over the tokens before it. Called
    before the pass over the last tokens of the cache's rows; other models need none of it.
    """
    switch = switch_length(transformer.config)
    if switch is None:
        return
    lengths_B = np.array([len(row) for row in rows])
    outgrown = np.flatnonzero(live_B & (lengths_B == switch + 1)).tolist()
    passes = _passes([switch + 1] * len(outgrown), tokens_per_pass) if outgrown else ()
    with _attention(transformer, varlen.NAME):
        for part in passes:
            places = outgrown[part.start : part.stop]
            batch = _packed([rows[place] for place in places]).to(transformer.device)
            with cache.rewritten(np.array(places)):
                transformer.get_decoder()(
                    input_ids=batch.tokens_T[None],
                    position_ids=batch.positions_T[None],
                    past_key_values=cache,
                    use_cache=True,
                    **varlen.segment_arguments(batch),
                )


def _packed(rows: Sequence[Sequence[int]]) -> Batch:
    """Rows end to end, without a loss."""
    samples = [np.asarray(row, dtype=np.int32) for row in rows]
    return make_batch([(tokens, np.zeros(len(tokens), np.float32)) for tokens in samples])


def prefill(
    transformer: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    cache: RowCache,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> Tensor:
    """Fill the cache with the packed prompts; returns the logits at the last token of each, [B, V]."""
    logits = []
    with _attention(transformer, varlen.NAME):
        for rows in _passes([len(prompt) for prompt in prompts], tokens_per_pass):
            batch = _packed([prompts[row] for row in rows]).to(transformer.device)
            cache.prefill(rows)
            output = transformer(
                input_ids=batch.tokens_T[None],
                position_ids=batch.positions_T[None],
                past_key_values=cache,
                use_cache=True,
                # else logits of every prompt token over the vocabulary
                logits_to_keep=batch.offsets[1:].long() - 1,
                **varlen.segment_arguments(batch),
            )
            logits.append(output.logits[0])
    cache.start_decoding()
    return torch.cat(logits)


def _passes(lengths: Sequence[int], tokens_per_pass: int) -> Iterator[range]:
    """Consecutive rows whose tokens together fit a pass; a longer row has a pass of its own."""
    start = tokens = 0
    for row, length in enumerate(lengths):
        if tokens and tokens + length > tokens_per_pass:
            yield range(start, row)
            start, tokens = row, 0
        tokens += length
    yield range(start, len(lengths))


def _collect(steps: Iterator[_Step], rows: int, max_new_tokens: int) -> list[Answer]:
    tokens = np.zeros((rows, max_new_tokens), np.int32)
    logprobs = np.zeros((rows, max_new_tokens), np.float32)
    lengths, cut, ended = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(rows, bool)
    for place, step in enumerate(steps):
        tokens[step.rows_L, place], logprobs[step.rows_L, place] = step.tokens_L, step.logprobs_L
        lengths[step.rows_L], ended[step.rows_L], cut[step.rows_L] = place + 1, step.ended_L, step.cut_L
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


@contextmanager
def _attention(transformer: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another attention. `varlen` ignores masks, so padded rows under it would be silently wrong."""
    varlen.register()
    previous = transformer.config._attn_implementation
    assert previous is not None  # set by every load
    transformer.set_attn_implementation(name)
    try:
        yield
    finally:
        transformer.set_attn_implementation(previous)


def _autocast(model: nn.Module) -> torch.autocast | nullcontext:
    """Autocast for models with bf16 weights, whose adapters are in fp32, as in training."""
    weight = next((weight for weight in model.parameters() if weight.dtype == torch.bfloat16), None)
    return torch.autocast(weight.device.type, torch.bfloat16) if weight is not None else nullcontext()
