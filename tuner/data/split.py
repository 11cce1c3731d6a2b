"""Held-out rows by a hash of their content, so that duplicates never cross."""

import hashlib
import json
from typing import Literal

from tuner.config.data import Split
from tuner.data.conversation import Conversation, Document

PartName = Literal["train", "validation", "test"]


def content_hash(item: Conversation | Document) -> bytes:
    """16 bytes of what a row says: roles, texts, names, calls, tools; not where it stands, nor its weight."""
    if isinstance(item, Document):
        said: list[object] = [item.text]
    else:
        said = [[turn.role, turn.content, turn.name, _calls(turn)] for turn in item.turns]
        said += [item.tools]
    normal = json.dumps(said, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def part_of(content: bytes, split: Split) -> PartName:
    """Which part a row with this content hash belongs to. Adding rows moves no other row."""
    share = int.from_bytes(content[:8], "big") / 2**64
    if share < split.test:
        return "test"
    return "validation" if share < split.test + split.validation else "train"


def _calls(turn: object) -> list[object]:
    return [[call.name, call.arguments] for call in getattr(turn, "tool_calls", ())]
