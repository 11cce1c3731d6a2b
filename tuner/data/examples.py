"""Tokenized samples in flat arrays, and the way from rendered text to tokens and loss weights.

Shapes: N samples, T tokens of all of them.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tuner.data.encoding import Tokenizer, backend
from tuner.data.rendered import Rendered, encode_slowly, encodings
from tuner.errors import UserError

Sample = tuple[np.ndarray, np.ndarray]
"""(tokens int32 [t], loss weights float32 [t])."""


@dataclass(frozen=True)
class Origins:
    """`file:line` of each sample, compact enough for millions of them."""

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
        """The origins of these samples, in this order."""
        return Origins(self.files, self.file_N[indices], self.line_N[indices])


@dataclass(frozen=True)
class Examples:
    """N tokenized samples, T tokens end to end."""

    tokens_T: np.ndarray
    """int32."""
    weights_T: np.ndarray
    """float32: weight of the loss of predicting this token; 0 where none is taken, as on every first token."""
    offsets: np.ndarray
    """int64 [N + 1]: sample i is tokens offsets[i] to offsets[i + 1]."""
    sources: np.ndarray
    """int32 [N]: number of the config's source that a sample comes from."""
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
        """int32: the tokens before a sample's last span in the loss: the prompt to sample an answer to."""
        return self.example(index)[0][: self._last_span(index)[0]]

    def reference(self, index: int) -> np.ndarray:
        """int32: the tokens of a sample's last span in the loss: the reference answer."""
        return self.example(index)[0][slice(*self._last_span(index))]

    def take(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """The samples of these indices, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[indices])]).astype(np.int64)
        positions = ranges(self.offsets, indices)
        return Examples(
            self.tokens_T[positions],
            self.weights_T[positions],
            offsets,
            self.sources[indices],
            self.origins.take(indices),
        )

    def totals(self, indices: Sequence[int]) -> dict[str, float]:
        """The normalizer of some samples' loss: the summed weights of their target `tokens`."""
        # fp64: the loss is divided by this sum, which fp32 would round differently for another order
        weights = (self.example(index)[1].sum(dtype=np.float64) for index in indices)
        return {"tokens": float(sum(weights))}

    def fingerprint(self) -> str:
        """Hash of all that the loss depends on, in order: equal for equal samples, whichever files they come from."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.tokens_T, self.weights_T, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _last_span(self, index: int) -> tuple[int, int]:
        """(first token, one past the last) of a sample's last run of target tokens; empty at the end without any."""
        targets = np.flatnonzero(self.example(index)[1])
        if not len(targets):
            length = int(self.lengths[index])
            return length, length
        gaps = np.flatnonzero(np.diff(targets) > 1)
        return int(targets[gaps[-1] + 1 if len(gaps) else 0]), int(targets[-1]) + 1


def ranges(offsets: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64: the indices offsets[r] to offsets[r + 1] of every row r, concatenated."""
    rows = np.asarray(rows, dtype=np.int64)
    counts = np.diff(offsets)[rows]
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return np.repeat(offsets[rows], counts) + within


class Collector:
    """Collects samples into Examples."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._places: list[tuple[int, int, int]] = []
        self._files: dict[str, int] = {}

    def add(self, sample: Sample, source: int, file: str, line: int) -> None:
        """Append a sample of the row at `file:line`; source: the number of its source."""
        self._tokens.append(sample[0])
        self._weights.append(sample[1])
        self._places.append((source, self._files.setdefault(file, len(self._files)), line))

    def finish(self) -> Examples | None:
        """All samples that were added; None when there are none."""
        if not self._tokens:
            return None
        lengths = np.fromiter(map(len, self._tokens), np.int64, len(self._tokens))
        source_N, file_N, line_N = np.array(self._places, dtype=np.int64).T
        return Examples(
            tokens_T=np.concatenate(self._tokens),
            weights_T=np.concatenate(self._weights),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            sources=source_N.astype(np.int32),
            # copied: a view would keep all three columns in memory
            origins=Origins(tuple(self._files), file_N.astype(np.int32), line_N.copy()),
        )


def tokenize(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> list[Sample]:
    """Tokens and loss weights of rendered conversations.

    Every text is encoded whole, since encoding it turn by turn gives other ids. The loss is taken on a token that
    begins inside one of the text's spans; never on the first token of a sample, which nothing predicts.
    """
    rust = backend(tokenizer)
    if rust is None:
        return [_tokenize_slowly(conversation, tokenizer) for conversation in rendered]
    return [
        _assign_weights(conversation, encoding.ids, partial(_first_token_from, encoding))
        for conversation, encoding in zip(rendered, encodings(rust, rendered, offsets=True), strict=True)
    ]


def tokenize_text(ids: Iterable[list[int]], tokenizer: Tokenizer, weights: Iterable[float]) -> list[Sample]:
    """Documents for continued pre-training: BOS, text, end token; the loss is taken on all tokens but the first.

    ids: of each document's text. weights: one for each document.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    samples: list[Sample] = []
    for text, weight in zip(ids, weights, strict=True):
        tokens = np.array([*begin, *text, *end], dtype=np.int32)
        weights_t = np.full(len(tokens), weight, dtype=np.float32)
        weights_t[:1] = 0
        samples.append((tokens, weights_t))
    return samples


def split_sample(sample: Sample, max_length: int) -> list[Sample]:
    """Split a sample into pieces of at most max_length tokens.

    Each piece begins with the last token of the one before as context, with weight 0: so the loss is taken on every
    token exactly once, as in the whole sample.
    """
    tokens, weights = sample
    if len(tokens) <= max_length:
        return [sample]
    pieces: list[Sample] = []
    for start in range(0, len(tokens) - 1, max_length - 1):
        piece_weights = weights[start : start + max_length].copy()
        piece_weights[0] = 0
        pieces.append((tokens[start : start + max_length], piece_weights))
    return pieces


def _assign_weights(rendered: Rendered, ids: list[int], first_token_from: Callable[[int], int]) -> Sample:
    """The sample of a text with these token ids. first_token_from: index of the first token at or after a character."""
    tokens = np.array(ids, dtype=np.int32)
    weights = np.zeros(len(tokens), dtype=np.float32)
    for begin, end, weight in rendered.spans:
        stop = len(tokens) if end >= len(rendered.text) else first_token_from(end)
        weights[first_token_from(begin) : stop] = weight
    # learn="all" has a span from the first character on, and nothing predicts the first token
    weights[:1] = 0
    return tokens, weights


def _first_token_from(encoding: Any, char: int) -> int:
    """Index of the first token that begins at or after a character; the number of tokens where there is none."""
    length = len(encoding)
    end = encoding.token_to_chars(length - 1)[1] if length else 0
    token = encoding.char_to_token(char)
    while token is None and char < end:  # white space that the tokenizer drops or assigns to no token
        char += 1
        token = encoding.char_to_token(char)
    if token is None:
        return length
    if encoding.token_to_chars(token)[0] < char:  # straddles the border, so it begins before it
        return token + 1
    while token and encoding.token_to_chars(token - 1)[0] >= char:
        token -= 1
    return token


def _tokenize_slowly(rendered: Rendered, tokenizer: Tokenizer) -> Sample:
    """For tokenizers without offsets: the text before a span's border must encode to a prefix of all ids."""
    ids = encode_slowly(tokenizer, rendered)

    def first_token_from(char: int) -> int:
        prefix = encode_slowly(tokenizer, rendered, char)
        if ids[: len(prefix)] != prefix:
            raise UserError(
                f"{rendered.origin}: this tokenizer has no offsets and merges tokens across the border of a turn, so "
                "the tokens to take the loss on are unknown; use a fast tokenizer (tokenizer.json) or another template"
            )
        return len(prefix)

    return _assign_weights(rendered, ids, first_token_from)
