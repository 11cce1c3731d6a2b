"""Held-out parts by a hash of the content, so that duplicates never end up on both sides."""

import hashlib
import json
from collections.abc import Sequence
from typing import Literal, get_args

from tuner.config.data import Split
from tuner.data.conversation import Conversation, Document, Preference, Prompt, Turn

PartName = Literal["train", "validation", "test"]
PARTS: tuple[PartName, ...] = get_args(PartName)


def content_hash(item: Conversation | Document | Preference | Prompt) -> bytes:
    """16-byte hash of a row's content: roles, texts, names, calls, tools, preferences; not of its origin or weight.

    Of a prompt: its turns, tools and condition, not the reference answer.
    """
    if isinstance(item, Document):
        return hash_values([item.text])
    if isinstance(item, Conversation):
        return hash_values([*plain_turns(item.turns), item.tools])
    if isinstance(item, Prompt):
        # with system and condition: the same prompt under two conditions is no duplicate
        return hash_values([plain_turns(item.policy_input().turns), item.condition, item.tools])
    answers = [plain_turns(answer) for answer in item.answers]
    return hash_values(
        [plain_turns(item.prompt), answers, item.ranks, item.margin, item.condition, item.tools]
    )


def hash_values(values: Sequence[object]) -> bytes:
    """16-byte hash of JSON values; of others, which a shape of the user's may bring, as texts."""
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def plain_turns(turns: Sequence[Turn]) -> list[object]:
    """The content of turns as JSON values."""
    return [[turn.role, turn.content, turn.name, _calls(turn)] for turn in turns]


def trainable_turns(item: Conversation | Document | Preference | Prompt) -> Sequence[Turn]:
    """The turns that the loss may be taken on; none of a document or a prompt."""
    if isinstance(item, Preference):
        return [turn for answer in item.answers for turn in answer]
    return item.turns if isinstance(item, Conversation) else ()


def assign_part(content: bytes, split: Split) -> PartName:
    """The part of a row with this content hash. It does not depend on other rows, so adding rows moves none."""
    share = int.from_bytes(content[:8], "big") / 2**64
    # the test part first: another share for validation leaves it as it is
    if share < split.test:
        return "test"
    return "validation" if share < split.test + split.validation else "train"


def _calls(turn: Turn) -> list[object]:
    return [[call.name, call.arguments] for call in turn.tool_calls]
