"""The tokenizer interface of the data layer, so that it need not import transformers."""

import hashlib
import json
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """The part of transformers' tokenizers that is used here, fast or slow."""

    @property
    def is_fast(self) -> bool: ...
    @property
    def bos_token(self) -> str | None: ...
    @property
    def eos_token(self) -> str | None: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def unk_token_id(self) -> int | None: ...
    @property
    def special_tokens_map(self) -> dict[str, Any]: ...

    def encode(
        self, text: str, /, *, add_special_tokens: bool = ..., split_special_tokens: bool = ...
    ) -> list[int]: ...
    def decode(self, ids: Any, /) -> Any: ...
    def convert_tokens_to_ids(self, tokens: Any, /) -> Any: ...
    def get_vocab(self) -> dict[str, int]: ...


def backend(tokenizer: Tokenizer) -> Any | None:
    """The Rust tokenizer of a fast tokenizer, with truncation and padding switched off; None for a slow one."""
    if not tokenizer.is_fast:
        return None
    rust: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009 (slow tokenizers have no such property)
    # tokenizer.json may set either, and both would silently change what is trained on
    if rust.truncation is not None:
        rust.no_truncation()
    if rust.padding is not None:
        rust.no_padding()
    return rust


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer itself puts its BOS before plain text, as Llama's and InternLM2's do."""
    ids = tokenizer.encode("a", add_special_tokens=True)
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text with the tokenizer's own special tokens, and no second BOS where the text spells one."""
    ids = tokenizer.encode(text, add_special_tokens=True)
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def is_one_token(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokenizer encodes `text` as a single token inside other text."""
    token = tokenizer.convert_tokens_to_ids(text)
    if token is None or (token == tokenizer.unk_token_id and text != getattr(tokenizer, "unk_token", None)):
        return False
    # an entry of the vocabulary is not enough: unless it is an added token, it may merge with its neighbors
    return token in tokenizer.encode(f"a{text}a", add_special_tokens=False)


def serialize(tokenizer: Tokenizer) -> str:
    """All that decides the ids of a text: equal for equal tokenizers, wherever they were loaded from."""
    rust = backend(tokenizer)
    definition = rust.to_str() if rust is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    # with the class: LlamaTokenizer reads InternLM2's file to other ids than AutoTokenizer does
    return json.dumps(
        [type(tokenizer).__name__, hashlib.sha256(definition.encode()).hexdigest(), special], sort_keys=True
    )
