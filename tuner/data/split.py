"""Held-out rows by a hash of their content, so that duplicates never cross."""

import hashlib
import json
from collections.abc import Sequence
from typing import Literal, get_args

from tuner.config.data import Split
from tuner.data.conversation import Conversation, Document, Preference, Prompt, Turn

PartName = Literal["train", "validation", "test"]
PARTS: tuple[PartName, ...] = get_args(PartName)


def content_hash(item: Conversation | Document | Preference | Prompt) -> bytes:
    """16 bytes of what a row says: roles, texts, names, calls, tools, preferences; not where it stands, nor its
    weight. Of a prompt what is asked, in which tools and condition: not the answer in its row."""
    if isinstance(item, Document):
        return hash_of([item.text])
    if isinstance(item, Conversation):
        return hash_of([*said_by(item.turns), item.tools])
    if isinstance(item, Prompt):
        return hash_of([said_by(item.asked().turns), item.condition, item.tools])
    answers = [said_by(answer) for answer in item.answers]
    return hash_of([said_by(item.prompt), answers, item.ranks, item.margin, item.condition, item.tools])


def hash_of(said: list[object]) -> bytes:
    """16 bytes of plain values."""
    normal = json.dumps(said, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def said_by(turns: Sequence[Turn]) -> list[object]:
    """What turns say, as plain values."""
    return [[turn.role, turn.content, turn.name, _calls(turn)] for turn in turns]


def turns_of(item: Conversation | Document | Preference | Prompt) -> Sequence[Turn]:
    """The turns that may be learned from; none of a document or a prompt."""
    if isinstance(item, Preference):
        return [turn for answer in item.answers for turn in answer]
    return item.turns if isinstance(item, Conversation) else ()


def part_of(content: bytes, split: Split) -> PartName:
    """Which part a row with this content hash belongs to. Adding rows moves no other row."""
    share = int.from_bytes(content[:8], "big") / 2**64
    if share < split.test:
        return "test"
    return "validation" if share < split.test + split.validation else "train"


def _calls(turn: object) -> list[object]:
    return [[call.name, call.arguments] for call in getattr(turn, "tool_calls", ())]
