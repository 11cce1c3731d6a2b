"""A tokenizer as the fields of a GGUF file, refused where llama.cpp would read other ids."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from tuner.data.encoding import adds_bos, backend
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.models.chat import end_ids
from tuner.models.folder_files import read_file
from tuner.models.model_file import GenerationFile
from tuner.models.to_gguf.llama_cpp_ids import (
    TEXTS,
    SentencePieces,
    differing,
    fitting_pre_tokenizer,
    is_byte_level,
    special_pattern,
)

_LOWEST = -1000.0
"""Score of the tokens that no merge makes, as llama.cpp's converter writes it."""
_GENERATION = re.compile(r"{%(-?)\s*(end)?generation\s*(-?)%}")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, and how texts are split into them."""

    model: str
    """llama.cpp's name: "gpt2" for byte-level BPE, "llama" for sentencepiece."""
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False


def read_vocabulary(tokenizer: Any, folder: Path, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer in a model folder, with as many tokens as the embedding has rows.

    Raises UserError where llama.cpp has no tokenizer that reads texts to the same ids.
    """
    rust = backend(tokenizer)
    if rust is None or type(rust.model).__name__ != "BPE":
        raise UserError(
            f"{folder}: a GGUF file takes tokenizers with BPE, and this is {type(tokenizer).__name__}; convert the "
            "complete model with llama.cpp's convert_hf_to_gguf.py"
        )
    texts = [*TEXTS, *_chats(tokenizer)]
    expected = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
    if is_byte_level(rust):
        vocabulary, different = _byte_level(tokenizer, rust, rows, expected)
    else:
        vocabulary, different = _sentencepiece(tokenizer, folder, rows, expected)
    if different:
        raise UserError(
            f"{folder}: llama.cpp reads other tokens than this tokenizer in {len(different)} of {len(expected)} texts, "
            f"such as {different[0]!r}; serve the complete model with vLLM or transformers instead"
        )
    return vocabulary


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: Any, folder: Path) -> None:
    """Write tokens, special tokens and the chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    writer.add_vocab_size(len(vocabulary.tokens))
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    # llama.cpp has three kinds of end tokens, and ends an answer at each
    for name, token in zip(("eot", "eom"), further_ends(tokenizer, folder), strict=False):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        # a tag of transformers, and for Jinja itself an error
        writer.add_chat_template(_GENERATION.sub(_plain_tag, tokenizer.chat_template))


def further_ends(tokenizer: Any, folder: Path) -> list[int]:
    """Tokens that end an answer besides the tokenizer's end of text: that of a chat's turn first."""
    ends: list[int] = []
    if tokenizer.chat_template:
        with suppress(UserError):  # a template that refuses a plain conversation
            ends += end_ids(Template("tokenizer", tokenizer), tokenizer)
    if (file := folder / "generation_config.json").is_file():
        declared = read_file(file, GenerationFile).eos_token_id
        ends += declared if isinstance(declared, list) else [] if declared is None else [declared]
    return [token for token in dict.fromkeys(ends) if token != tokenizer.eos_token_id]


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether llama.cpp shall put the begin token before every text: the tokenizer does, and the chat template has it,
    too. A program that renders the template then drops the second one."""
    return adds_bos(tokenizer) and all(chat.startswith(tokenizer.bos_token) for chat in _chats(tokenizer))


def _plain_tag(tag: re.Match[str]) -> str:
    return f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}"


def _chats(tokenizer: Any) -> list[str]:
    """A conversation as the tokenizer's chat template renders it; [] where it has none, or it refuses a plain one."""
    if tokenizer.chat_template:
        with suppress(UserError):
            template = Template("tokenizer", tokenizer)
            return [template.render(template.example).text]
    return []


def _byte_level(
    tokenizer: Any, rust: Any, rows: int, expected: dict[str, list[int]]
) -> tuple[Vocabulary, list[str]]:
    pre, different = fitting_pre_tokenizer(rust, expected)
    tokens, types = _tokens(tokenizer, {token: text for text, token in tokenizer.get_vocab().items()}, rows)
    merges = json.loads(rust.to_str())["model"]["merges"]
    # older files have them as one text
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return Vocabulary("gpt2", pre or "default", tokens, types, merges), different


def _sentencepiece(
    tokenizer: Any, folder: Path, rows: int, expected: dict[str, list[int]]
) -> tuple[Vocabulary, list[str]]:
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise UserError(
            f"{folder}: has no tokenizer.model, whose scores a GGUF file needs; copy it from the base model"
        )
    from sentencepiece import SentencePieceProcessor

    pieces: Any = SentencePieceProcessor(str(file))
    # an empty text in C; llama.cpp's converter renames it so, too
    texts = {
        token: pieces.id_to_piece(token).replace("\x00", "🐉") for token in range(pieces.get_piece_size())
    }
    tokens, types = _tokens(tokenizer, texts, rows)
    scores = [_LOWEST] * rows
    added = tokenizer.added_tokens_decoder
    for token in texts:
        if token not in added and token < rows:
            scores[token], types[token] = pieces.get_score(token), _type_of_piece(pieces, token)
    special = special_pattern([tokens[token] for token in added])
    different = {}
    for space_prefix in (True, False):
        ids = {text: token for token, text in enumerate(tokens)}
        encode = SentencePieces(ids, scores, special, space_prefix).encode
        different[space_prefix] = differing(expected, encode)
    best = min(different, key=lambda prefix: len(different[prefix]))
    return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=best), different[best]


def _tokens(tokenizer: Any, texts: dict[int, str], rows: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types of all tokens; rows of the embedding that no token has are unused ones."""
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for token in range(rows):
        if token in added:
            special = added[token].special
            tokens.append(added[token].content if special else added[token].content.replace("▁", " "))
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        elif token in texts:
            tokens.append(texts[token])
            types.append(TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{token}]")
            types.append(TokenType.UNUSED)
    return tokens, types


def _type_of_piece(pieces: Any, token: int) -> TokenType:
    kinds = {
        TokenType.UNKNOWN: pieces.is_unknown(token),
        TokenType.CONTROL: pieces.is_control(token),
        TokenType.UNUSED: pieces.is_unused(token) or pieces.id_to_piece(token).startswith("[UNUSED"),
        TokenType.BYTE: pieces.is_byte(token),
    }
    return next((kind for kind, holds in kinds.items() if holds), TokenType.NORMAL)
