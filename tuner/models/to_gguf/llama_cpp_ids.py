"""The ids that llama.cpp reads texts as, to compare them with a tokenizer's own.

GGUF files name a pre-tokenizer, which llama.cpp knows by name alone. Which name fits is measured: its rules, from
src/llama-vocab.cpp, are applied to texts that most rules read differently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SHORT = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDS_AT_SLASH = _ENDS.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_CASED = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
_UPPER = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer of llama.cpp."""

    patterns: tuple[str, ...]
    """What a text is split by, one after the other."""
    whole_words: bool = False
    """Whether a word that is a token is not merged from its parts."""


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((_WORDS,)),
    "smollm": PreTokenizer((r"\p{N}", _WORDS)),
    "qwen2": PreTokenizer((rf"(?:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_ENDS}",)),
    "qwen35": PreTokenizer(
        (
            rf"(?:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
            + _ENDS.replace(r"\p{L}", r"\p{L}\p{M}", 1),
        )
    ),
    "llama-bpe": PreTokenizer(
        (rf"(?:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_ENDS}",), whole_words=True
    ),
    "smaug-bpe": PreTokenizer((rf"(?:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_ENDS}",)),
    "tekken": PreTokenizer((rf"{_CASED}|{_UPPER}|\p{{N}}|{_ENDS_AT_SLASH}",), whole_words=True),
    "gpt-4o": PreTokenizer(
        (rf"{_CASED}(?:{_SHORT})?|{_UPPER}(?:{_SHORT})?|\p{{N}}{{1,3}}|{_ENDS_AT_SLASH}",)
    ),
}
"""By the name in `tokenizer.ggml.pre`; the first that fits is taken."""

_SNIPPETS = (
    "Hello world", "don't I'LL we've", "can'T", "x1234567.50", "3.14159", "12 + 345 = 357", "HTTPServer", "camelCase",
    "Ünïcödé", "naïve café", "Straße", "Привет, мир", "你好，世界", "日本語のテキスト", "한국어 문장", "ภาษาไทย",
    "trailing   ", "ends\n", "a  b   c", "\u00a0wide\u3000", "...", "!?!?", "a/b//c\n/", "http://a.b/c?d=1&e=2",
    "def f(x):\n    return x**2\n", "{\"k\": [1, 2]}", "<b>bold</b>", "`code`", "$5,000.00", "№ ½ ² Ⅷ", "_snake_case_",
    "–—…„“”", "C++ & C#", "\u200bzero\u200dwidth", "ＦＵＬＬ１２３", "0x1F", "1st 2nd", "!important",
)  # fmt: skip
_FORMS = (
    "{0}",
    " {0}",
    "  {0}",
    "{0} ",
    "\n{0}",
    "a{0}",
    "7{0}",
    "{0}{0}",
    "{0}\n\n{0}",
    "({0})",
    "A {0}, b",
)
TEXTS = tuple(form.format(snippet) for snippet in _SNIPPETS for form in _FORMS)
"""Texts that most pre-tokenizers read differently. All in Unicode's form NFC: llama.cpp does not
normalize, and Qwen's tokenizers do."""


def fitting_pre_tokenizer(rust: Tokenizer, expected: Mapping[str, list[int]]) -> tuple[str | None, list[str]]:
    """Name of the pre-tokenizer by which llama.cpp reads texts as a byte-level tokenizer does, and ([] for a name) the
    texts that the nearest one reads differently.

    expected: text → the tokenizer's own ids.
    """
    copy = Tokenizer.from_str(rust.to_str())
    copy.normalizer = normalizers.Sequence([])
    nearest = list(expected)
    for name, rules in PRE_TOKENIZERS.items():
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        copy.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        copy.model.ignore_merges = rules.whole_words
        different = differing(expected, lambda text: copy.encode(text, add_special_tokens=False).ids)
        if not different:
            return name, []
        nearest = min(nearest, different, key=len)
    return None, nearest


def differing(expected: Mapping[str, list[int]], encode: Callable[[str], list[int]]) -> list[str]:
    """The texts that are encoded to other ids than expected."""
    return [text for text, ids in expected.items() if encode(text) != ids]


@dataclass(frozen=True)
class SentencePieces:
    """llama.cpp's reading of a sentencepiece vocabulary: pairs are merged by score."""

    ids: Mapping[str, int]
    scores: list[float]
    special: Any
    """Pattern of the tokens that are read wherever they stand."""
    space_prefix: bool
    """Whether a space is put before a text, and after every such token."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a begin token."""
        ids: list[int] = []
        for part in self.special.split(text):
            if part in self.ids and self.special.fullmatch(part):
                ids.append(self.ids[part])
            elif part:
                ids += self._merge((" " if self.space_prefix else "") + part)
        return ids

    def _merge(self, text: str) -> list[int]:
        symbols = list(text.replace(" ", "▁"))
        while True:
            pairs = [
                (self.scores[self.ids[left + right]], -place)
                for place, (left, right) in enumerate(pairwise(symbols))
                if left + right in self.ids
            ]
            if not pairs:
                break
            place = -max(pairs)[1]
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        return [token for symbol in symbols for token in self._tokens(symbol)]

    def _tokens(self, symbol: str) -> list[int]:
        if symbol in self.ids:
            return [self.ids[symbol]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]


def special_pattern(tokens: list[str]) -> Any:
    """Pattern that splits a text at tokens, the longest first, and keeps them."""
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


def is_byte_level(rust: Tokenizer) -> bool:
    """Whether a tokenizer encodes bytes as letters, as GPT-2's does."""
    return '"ByteLevel"' in json.dumps(json.loads(rust.to_str())["pre_tokenizer"])
