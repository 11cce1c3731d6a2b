"""Control tokens that texts spell: which of them stay text, and how a text that spells some is encoded.

Tokenizers take every `<|im_end|>` in a text for the token, whether the template wrote it or a user. Here those of a
turn's text are told from the template's by marks put before them, and texts that have some are encoded by a twin of
the tokenizer in which control tokens have other names.
"""

import json
import random
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, cast

from tuner.config.data import Reading
from tuner.data.encoding import Tokenizer, backend
from tuner.errors import UserError

BEGIN, END = ("".join(secrets.choice("0123456789") for _ in range(40)) for _ in range(2))
"""Stand around a spelled control token while a template renders. Digits, since filters may change other characters;
random in every process, so that no row can contain them."""
MARKED = rf"{BEGIN}\g<0>{END}"
BLANKED = "7"
"""What control tokens that a message spells are replaced by."""

_IN_TEXTS = (
    *("<think>", "</think>", "[THINK]", "[/THINK]"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)
"""Tokens that belong into texts, which some tokenizers call special and some templates write."""
_IN_ANSWERS = ("<|plugin|>", "<|interpreter|>", "<|action_start|>", "<|action_end|>", "<|python_tag|>")
"""Special tokens that InternLM2 and Llama 3.1 write in their answers, also where the template shows no call."""
_MARKER = re.compile(r"[^\w\s].*\w.*[^\w\s]")
"""The form of a control token's name. Others, as a padding token "!", are words and signs that texts consist of."""
_STAND_INS = range(0xF0000, 0xFFFFE)
"""Unicode's private plane 15, of which texts have no character."""


class ControlTokens:
    """The added tokens of a tokenizer, and how each is read where a turn's text spells it.

    "text": as text. "answers": as the token in the assistant's turns, as text elsewhere. "token": as the token. By
    default, special tokens and those that the template writes around turns are text, special tokens that it writes in
    an answer for a call or a thought are tokens in answers, and all others are tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        written: str = "",
        in_answers: Sequence[str] = (),
        overrides: Mapping[str, Reading] = MappingProxyType({}),
    ):
        """written: a conversation as the template renders it. in_answers: others, whose answers have calls or thoughts.

        overrides: readings of some tokens; those that the tokenizer does not have are left out.
        """
        self._tokenizer = tokenizer
        self.readings = _readings(tokenizer, written, in_answers, overrides)
        """Of every added token: first those that the template writes, then the others in the order of their ids."""
        self._elsewhere = _pattern(name for name, reading in self.readings.items() if reading != "token")
        self._in_answers = _pattern(name for name, reading in self.readings.items() if reading == "text")
        self._first_characters = {name[0] for name, reading in self.readings.items() if reading != "token"}

    @classmethod
    def of_texts(cls, tokenizer: Tokenizer, overrides: Mapping[str, Reading]) -> "ControlTokens":
        """Those of raw text: all are read as tokens, since nothing but the text itself can write them."""
        names = _added_tokens(tokenizer)
        return cls(tokenizer, overrides={**dict.fromkeys(names, "token"), **overrides})

    def check(self, overrides: Mapping[str, Reading], section: str) -> None:
        """Raise UserError where a config gives a reading of what is no added token. section: of the config."""
        if unknown := [name for name in overrides if name not in self.readings]:
            raise UserError(
                f"{section}.spelled_tokens names {unknown[0]!r}, which is no added token of this model's tokenizer; "
                "`tuner data` shows those it has"
            )

    def rewrite_message(self, message: dict[str, Any], into: str) -> dict[str, Any]:
        """A message with the control tokens that are to stay text MARKED or BLANKED; the same object without any."""
        content = self._rewrite(message["content"], into, answer=message["role"] == "assistant")
        if content is message["content"] and len(message) == 2:
            return message
        rewritten = {key: self.rewrite_values(value, into) for key, value in message.items()}
        rewritten["content"] = content
        if "name" in message:  # a part of the header: InternLM2's `name=<|plugin|>`
            rewritten["name"] = self._rewrite(message["name"], into, answer=True)
        return message if rewritten == message else rewritten

    def rewrite_values(self, value: Any, into: str) -> Any:
        """JSON values with all texts and keys in them rewritten, as those of a message."""
        if isinstance(value, str):
            return self._rewrite(value, into, answer=False)
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value).items()
            return {self.rewrite_values(key, into): self.rewrite_values(item, into) for key, item in items}
        if isinstance(value, list | tuple):
            return [self.rewrite_values(item, into) for item in cast("list[Any]", value)]
        return value

    def count_others(self, text: str, starts: Collection[int] = ()) -> int:
        """Occurrences elsewhere than at these places of the control tokens that are text in all turns."""
        matches = self._in_answers.finditer(text) if self._in_answers else ()
        return sum(match.start() not in starts for match in matches)

    def spelled(self, text: str, *, answer: bool = False) -> "Spelled | None":
        """Where a text that no template wrote spells control tokens; None where it does not."""
        pattern = self._pattern_for(text, answer)
        if pattern is None:
            return None
        starts = frozenset(match.start() for match in pattern.finditer(text))
        return Spelled(self, starts) if starts else None

    def spelled_at(self, text: str, starts: Collection[int]) -> list[str]:
        """The control tokens that a text spells at these places."""
        return [match[0] for match in self._matches(text) if match.start() in starts]

    def encode_batch(self, texts: Sequence[tuple[str, Collection[int]]], *, offsets: bool) -> list[Any]:
        """Encodings of texts with the places where they spell control tokens; by a fast tokenizer.

        offsets: whether the characters of the tokens are needed.
        """
        twin, stand_ins = self._twin
        # names of equal length, so that offsets are those of the text
        renamed = [
            cast("re.Pattern[str]", self._elsewhere).sub(
                lambda match, starts=starts: match[0] if match.start() in starts else stand_ins[match[0]],
                text,
            )
            for text, starts in texts
        ]
        encode = twin.encode_batch if offsets else twin.encode_batch_fast
        return encode(renamed, add_special_tokens=False)

    def encode_slowly(self, text: str, starts: Collection[int]) -> list[int]:
        """Token ids by a slow tokenizer: what is spelled is encoded by itself, and so is what stands between."""
        ids: list[int] = []
        position = 0
        for match in self._matches(text):
            if match.start() in starts:
                ids += self._encode(text[position : match.start()])
                ids += self._encode_spelled(match[0])
                position = match.end()
        return ids + self._encode(text[position:])

    def _rewrite(self, text: str, into: str, *, answer: bool) -> str:
        pattern = self._pattern_for(text, answer)
        return text if pattern is None else pattern.sub(into, text)

    def _pattern_for(self, text: str, answer: bool) -> re.Pattern[str] | None:
        """What finds the tokens that are to stay text; None where the text has none."""
        # most texts have none of these characters, and to look for them is several times faster than the pattern
        if not any(character in text for character in self._first_characters):
            return None
        return self._in_answers if answer else self._elsewhere

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def _encode_spelled(self, name: str) -> list[int]:
        ids = self._tokenizer.encode(name, add_special_tokens=False, split_special_tokens=True)
        token = self._tokenizer.convert_tokens_to_ids(name)
        if token in ids and token != self._tokenizer.unk_token_id:
            raise _indistinguishable(name)
        return ids

    def _matches(self, text: str) -> list[re.Match[str]]:
        return list(self._elsewhere.finditer(text)) if self._elsewhere else []

    @cached_property
    def _twin(self) -> tuple[Any, dict[str, str]]:
        """The Rust tokenizer with other names for control tokens, and the names."""
        rust: Any = backend(self._tokenizer)
        names = [name for name, reading in self.readings.items() if reading != "token"]
        stand_ins = _stand_ins(names)
        twin = _rename(rust, stand_ins)
        for name, stand_in in stand_ins.items():
            token, ids = rust.token_to_id(name), twin.encode(stand_in, add_special_tokens=False).ids
            spelled = twin.encode(name, add_special_tokens=False).ids
            # an unknown piece of what is spelled is as good as of any other text
            if (
                token not in ids
                or not spelled
                or (token in spelled and token != self._tokenizer.unk_token_id)
            ):
                raise _indistinguishable(name)
        return twin, stand_ins


@dataclass(frozen=True, slots=True)
class Spelled:
    """Where a text spells control tokens that stay text."""

    control: ControlTokens
    starts: frozenset[int]
    """First character of each."""

    def names(self, text: str) -> set[str]:
        """The tokens that this text spells."""
        return set(self.control.spelled_at(text, self.starts))


def reward_readings(overrides: Mapping[str, Reading], reward_token: str | None) -> dict[str, Reading]:
    """A reward model's: its reward token is text wherever a turn spells it, or an answer could choose its score."""
    return {**overrides, **({} if reward_token is None else {reward_token: "text"})}


def _readings(
    tokenizer: Tokenizer, written: str, in_answers: Sequence[str], overrides: Mapping[str, Reading]
) -> dict[str, Reading]:
    roles = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}

    def reading(name: str, special: bool) -> Reading:
        if name in overrides:
            return overrides[name]
        if name in _IN_TEXTS:
            return "token"
        inside = any(name in text and not text.rstrip().endswith(name) for text in in_answers)
        if name not in written and (name in _IN_ANSWERS or (special and inside)):
            return "answers"
        control = special or name in roles or name in written
        return "text" if control and _MARKER.fullmatch(name) else "token"

    added = _added_tokens(tokenizer)
    first = sorted(added, key=lambda name: (name not in written, name not in roles))
    return {name: reading(name, added[name]) for name in first}


def _added_tokens(tokenizer: Tokenizer) -> dict[str, bool]:
    """Added token -> whether the tokenizer calls it special, in the order of their ids."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return {str(added[token]): added[token].special for token in sorted(added) if str(added[token])}


def _pattern(names: Any) -> re.Pattern[str] | None:
    # the longest first, as tokenizers match them
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _stand_ins(names: Sequence[str]) -> dict[str, str]:
    """Name -> another of equal length, random in every process, so that no row can contain it."""
    system = random.SystemRandom()
    firsts = system.sample(_STAND_INS, len(names))
    return {
        name: chr(first) + "".join(chr(system.choice(_STAND_INS)) for _ in name[1:])
        for name, first in zip(names, firsts, strict=True)
    }


def _rename(rust: Any, stand_ins: Mapping[str, str]) -> Any:
    """A copy of a Rust tokenizer with other names for some tokens, which it cannot put together from pieces either."""
    definition = json.loads(rust.to_str())
    for token in definition["added_tokens"]:
        if token["content"] in stand_ins:
            # normalized, the name would be looked for with a prefix (early Llamas' ▁) that the text does not have;
            # under the old name, those models' merges made up for it
            token |= {"content": stand_ins[token["content"]], "normalized": False}
    model = definition["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        entries = cast("dict[str, int]", vocabulary).items()
        model["vocab"] = {stand_ins.get(piece, piece): token for piece, token in entries}
    else:  # Unigram's pieces and scores
        model["vocab"] = [[stand_ins.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _involves(merge, stand_ins)]
    if model.get("unk_token") in stand_ins:
        model["unk_token"] = stand_ins[model["unk_token"]]
    return rust.from_str(json.dumps(definition))


def _involves(merge: Any, names: Collection[str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left + right in names or left in names or right in names


def _indistinguishable(name: str) -> UserError:
    return UserError(
        f"this tokenizer cannot encode {name} as text where a turn spells it; use a fast tokenizer (tokenizer.json), "
        f'take it out of the row, or have it read as the token: spelled_tokens={{"{name}": "token"}}'
    )
