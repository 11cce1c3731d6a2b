"""Tokenised samples end to end, and the way from rendered text to tokens and weights.

Shapes: N samples, T tokens of all of them.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuner.data.encoding import Tokenizer, backend
from tuner.data.template import Rendered
from tuner.errors import UserError

Sample = tuple[np.ndarray, np.ndarray]
"""(tokens, weights) of one sample."""


@dataclass(frozen=True)
class Origins:
    """Where each sample comes from, cheap for millions of them."""

    files: tuple[str, ...]
    file_N: np.ndarray
    """int32: index into `files`."""
    line_N: np.ndarray
    """int64: line (JSONL) or row (Parquet, hub) in that file, from 1."""

    def __len__(self) -> int:
        return len(self.line_N)

    def __getitem__(self, index: int) -> str:
        return f"{self.files[self.file_N[index]]}:{self.line_N[index]}"

    def take(self, indices: np.ndarray) -> "Origins":
        return Origins(self.files, self.file_N[indices], self.line_N[indices])


@dataclass(frozen=True)
class Examples:
    """Tokenised samples end to end: N samples, T tokens."""

    tokens_T: np.ndarray
    """int32."""
    weights_T: np.ndarray
    """float32: the weight with which a token is learned as a target; 0 = not learned. A first token is 0."""
    offsets: np.ndarray
    """int64 [N + 1]: sample i is tokens offsets[i] to offsets[i + 1]."""
    sources: np.ndarray
    """int32 [N]: which of the config's sources it comes from."""
    origins: Origins

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]."""
        return np.diff(self.offsets)

    def example(self, index: int) -> Sample:
        """(tokens, weights) of a sample, as views."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens_T[part], self.weights_T[part]

    def origin(self, index: int) -> str:
        """`file:line` of a sample."""
        return self.origins[index]

    def prompt(self, index: int) -> np.ndarray:
        """int32: the tokens before a sample's last learned span, what an answer is sampled for."""
        return self.example(index)[0][: self._last_span(index)[0]]

    def reference(self, index: int) -> np.ndarray:
        """int32: the tokens of a sample's last learned span, the answer the data gives."""
        return self.example(index)[0][slice(*self._last_span(index))]

    def take(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """These samples, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[indices])]).astype(np.int64)
        places = ranges(self.offsets, indices)
        return Examples(
            self.tokens_T[places],
            self.weights_T[places],
            offsets,
            self.sources[indices],
            self.origins.take(indices),
        )

    def totals(self, indices: Sequence[int]) -> dict[str, float]:
        """Summed weights of some samples: of their learned `tokens`."""
        weights = (self.example(index)[1].sum(dtype=np.float64) for index in indices)
        return {"tokens": float(sum(weights))}

    def fingerprint(self) -> str:
        """Hash of what is learned, in order: equal for equal samples, wherever they came from."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.tokens_T, self.weights_T, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _last_span(self, index: int) -> tuple[int, int]:
        learned = np.flatnonzero(self.example(index)[1])
        if not len(learned):
            length = int(self.lengths[index])
            return length, length
        breaks = np.flatnonzero(np.diff(learned) > 1)
        return int(learned[breaks[-1] + 1 if len(breaks) else 0]), int(learned[-1]) + 1


def ranges(offsets: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """The indices offsets[r] to offsets[r + 1] of all rows r, one row after the other."""
    rows = np.asarray(rows, dtype=np.int64)
    counts = np.diff(offsets)[rows]
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return np.repeat(offsets[rows], counts) + within


class Collector:
    """Gathers samples into Examples."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._places: list[tuple[int, int, int]] = []
        self._files: dict[str, int] = {}

    def add(self, sample: Sample, source: int, file: str, line: int) -> None:
        """One more sample, from `file:line` of the source of that number."""
        self._tokens.append(sample[0])
        self._weights.append(sample[1])
        self._places.append((source, self._files.setdefault(file, len(self._files)), line))

    def finish(self) -> Examples | None:
        """What was gathered; None when nothing was."""
        if not self._tokens:
            return None
        lengths = np.fromiter(map(len, self._tokens), np.int64, len(self._tokens))
        source_N, file_N, line_N = np.array(self._places, dtype=np.int64).T
        return Examples(
            tokens_T=np.concatenate(self._tokens),
            weights_T=np.concatenate(self._weights),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            sources=source_N.astype(np.int32),
            origins=Origins(tuple(self._files), file_N.astype(np.int32), line_N.copy()),
        )


def tokenize(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> list[Sample]:
    """Tokens and weights of rendered conversations.

    Every text is encoded whole: encoding it turn by turn gives other ids. A token is learned when it begins
    inside a learned span; the first token of a sample never is, for nothing predicts it.
    """
    rust = backend(tokenizer)
    if rust is None:
        return [_tokenize_slowly(one, tokenizer) for one in rendered]
    encodings = rust.encode_batch([one.text for one in rendered], add_special_tokens=False)
    return [
        _weigh(one, encoding.ids, lambda char, encoding=encoding: _first_token_from(encoding, char))
        for one, encoding in zip(rendered, encodings, strict=True)
    ]


def tokenize_text(ids: Iterable[list[int]], tokenizer: Tokenizer, weights: Iterable[float]) -> list[Sample]:
    """Documents for continued pre-training: BOS, text, end token; every token but the first is learned."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    samples = []
    for text, weight in zip(ids, weights, strict=True):
        tokens = np.array([*begin, *text, *end], dtype=np.int32)
        weights_t = np.full(len(tokens), weight, dtype=np.float32)
        weights_t[:1] = 0
        samples.append((tokens, weights_t))
    return samples


def split_sample(sample: Sample, max_length: int) -> list[Sample]:
    """Pieces of at most max_length tokens. Each begins with the last token of the one before, as context, so
    that every token of the sample is learned exactly as often as in the whole: once."""
    tokens, weights = sample
    if len(tokens) <= max_length:
        return [sample]
    pieces = []
    for start in range(0, len(tokens) - 1, max_length - 1):
        piece = weights[start : start + max_length].copy()
        piece[0] = 0
        pieces.append((tokens[start : start + max_length], piece))
    return pieces


def _weigh(one: Rendered, ids: list[int], first_token_from: Any) -> Sample:
    tokens = np.array(ids, dtype=np.int32)
    weights = np.zeros(len(tokens), dtype=np.float32)
    for begin, end, weight in one.spans:
        last = len(tokens) if end >= len(one.text) else first_token_from(end)
        weights[first_token_from(begin) : last] = weight
    weights[:1] = 0
    return tokens, weights


def _first_token_from(encoding: Any, char: int) -> int:
    """Index of the first token that begins at or behind a character."""
    length = len(encoding)
    end = encoding.token_to_chars(length - 1)[1] if length else 0
    token = encoding.char_to_token(char)
    while token is None and char < end:  # white space that a tokenizer drops or counts to no token
        char += 1
        token = encoding.char_to_token(char)
    if token is None:
        return length
    if encoding.token_to_chars(token)[0] < char:  # straddles the edge: it began before
        return token + 1
    while token and encoding.token_to_chars(token - 1)[0] >= char:
        token -= 1
    return token


def _tokenize_slowly(one: Rendered, tokenizer: Tokenizer) -> Sample:
    """For tokenizers that tell no offsets: the text before an edge must encode to the first ids of all."""
    ids = tokenizer.encode(one.text, add_special_tokens=False)

    def first_token_from(char: int) -> int:
        before = tokenizer.encode(one.text[:char], add_special_tokens=False)
        if ids[: len(before)] != before:
            raise UserError(
                f"{one.origin}: this tokenizer tells no offsets and joins tokens over the edge of a turn, so "
                "what is learned cannot be told; use a fast tokenizer (tokenizer.json) or another template"
            )
        return len(before)

    return _weigh(one, ids, first_token_from)
