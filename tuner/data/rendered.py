"""A conversation as one text, and its token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from tuner.data.control_tokens import Spelled
from tuner.data.encoding import Tokenizer, backend


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation or document as text, with the spans that the loss is taken on."""

    text: str
    spans: list[tuple[int, int, float]] = field(default_factory=list[tuple[int, int, float]])
    """(first character, one past the last, loss weight); where two overlap, the later one counts."""
    origin: str = ""
    """`file:line`, for messages."""
    learned: Mapping[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    """Turn that the loss is taken on -> (first character, one past the last) of what is learned of it."""
    spelled: Spelled | None = None
    """Where its turns spell control tokens that stay text; None where they do not."""


def encode(tokenizer: Tokenizer, rendered: Sequence[Rendered]) -> list[list[int]]:
    """Token ids of every text, without special tokens added."""
    rust = backend(tokenizer)
    if rust is None:
        return [encode_slowly(tokenizer, text) for text in rendered]
    # without offsets, which only the spans of conversations need
    return [encoding.ids for encoding in encodings(rust, rendered, offsets=False)]


def encodings(rust: Any, rendered: Sequence[Rendered], *, offsets: bool) -> list[Any]:
    """The Rust tokenizer's encoding of every text. offsets: whether the characters of the tokens are needed."""
    # encode_batch_fast leaves all offsets zero
    encode_batch = rust.encode_batch if offsets else rust.encode_batch_fast
    texts = [text.text for text in rendered if text.spelled is None]
    plain = iter(encode_batch(texts, add_special_tokens=False))
    spelling = [(text.text, text.spelled) for text in rendered if text.spelled is not None]
    others = (
        encoding
        for control, group in groupby(spelling, lambda item: item[1].control)
        for encoding in control.encode_batch(
            [(text, spelled.starts) for text, spelled in group], offsets=offsets
        )
    )
    return [next(plain if text.spelled is None else others) for text in rendered]


def encode_slowly(tokenizer: Tokenizer, rendered: Rendered, end: int | None = None) -> list[int]:
    """Token ids by a slow tokenizer. end: encode the text up to this character."""
    text, spelled = rendered.text[:end], rendered.spelled
    if spelled is None:
        return tokenizer.encode(text, add_special_tokens=False)
    return spelled.control.encode_slowly(text, spelled.starts)
