"""Tokenized prompts in flat arrays, each with its row.

Shapes: N prompts, T tokens and B bytes of JSON of all of them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuner.data.conversation import Prompt, ToolCall, Turn
from tuner.data.examples import Examples, Origins, ranges


@dataclass(frozen=True)
class PromptSet:
    """N prompts: their tokens for the policy, and their rows as JSON for reward models and rule-based rewards.

    Everything is in flat arrays, which the cache maps into memory: no Python objects are held per prompt.
    """

    tokens_T: np.ndarray
    """int32: each prompt ends with the header of the assistant's turn."""
    offsets: np.ndarray
    """int64 [N + 1]: prompt i is tokens offsets[i] to offsets[i + 1]."""
    rows_B: np.ndarray
    """uint8: turns, tools, reference and values of each prompt, as UTF-8 JSON."""
    row_offsets: np.ndarray
    """int64 [N + 1]: the JSON of prompt i is bytes row_offsets[i] to row_offsets[i + 1]."""
    conditions: np.ndarray
    """int32 [N]: index into condition_names; -1 where a prompt has none."""
    condition_names: tuple[str, ...]
    """Conditions that some prompt has."""
    sources: np.ndarray
    """int32 [N]: number of the config's source that a prompt comes from."""
    origins: Origins

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]."""
        return np.diff(self.offsets)

    def tokens(self, index: int) -> np.ndarray:
        """int32: the tokens of a prompt, as a view."""
        return self.tokens_T[self.offsets[index] : self.offsets[index + 1]]

    def prompt(self, index: int) -> Prompt:
        """A prompt with the reference answer and the values of its row."""
        row = self.rows_B[self.row_offsets[index] : self.row_offsets[index + 1]]
        return _from_json(row.tobytes(), self.condition(index), self.origin(index))

    def condition(self, index: int) -> str | None:
        """Name of a prompt's condition; None where it has none."""
        number = int(self.conditions[index])
        return self.condition_names[number] if number >= 0 else None

    def origin(self, index: int) -> str:
        """`file:line` of a prompt."""
        return self.origins[index]

    def take(self, indices: Sequence[int] | np.ndarray) -> "PromptSet":
        """The prompts of these indices, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        return PromptSet(
            tokens_T=self.tokens_T[ranges(self.offsets, indices)],
            offsets=_offsets(self.lengths[indices]),
            rows_B=self.rows_B[ranges(self.row_offsets, indices)],
            row_offsets=_offsets(np.diff(self.row_offsets)[indices]),
            conditions=self.conditions[indices],
            condition_names=self.condition_names,
            sources=self.sources[indices],
            origins=self.origins.take(indices),
        )

    def examples(self) -> Examples:
        """The tokens as samples without a token in the loss, for inspection."""
        weights_T = np.zeros(len(self.tokens_T), dtype=np.float32)
        return Examples(self.tokens_T, weights_T, self.offsets, self.sources, self.origins)

    def fingerprint(self) -> str:
        """Hash of the prompts and their rows, in order: equal for equal ones, whichever files they come from."""
        digest = hashlib.blake2b(json.dumps(self.condition_names).encode(), digest_size=16)
        for array in (self.tokens_T, self.offsets, self.rows_B, self.row_offsets, self.conditions):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class PromptCollector:
    """Collects prompts into a PromptSet."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._rows: list[bytes] = []
        self._places: list[tuple[int, int, int, int]] = []
        self._files: dict[str, int] = {}
        self._names: dict[str, int] = {}

    def add(self, piece: tuple[np.ndarray, Prompt], source: int, file: str, line: int) -> None:
        """Append a prompt and its tokens, read from `file:line`; source: the number of its source."""
        tokens, prompt = piece
        name = prompt.condition
        condition = -1 if name is None else self._names.setdefault(name, len(self._names))
        self._tokens.append(tokens)
        self._rows.append(_to_json(prompt))
        self._places.append((source, self._files.setdefault(file, len(self._files)), line, condition))

    def finish(self) -> PromptSet | None:
        """All prompts that were added; None when there are none."""
        if not self._tokens:
            return None
        source_N, file_N, line_N, condition_N = np.array(self._places, dtype=np.int64).T
        return PromptSet(
            tokens_T=np.concatenate(self._tokens),
            offsets=_offsets(np.fromiter(map(len, self._tokens), np.int64, len(self._tokens))),
            rows_B=np.frombuffer(b"".join(self._rows), dtype=np.uint8),
            row_offsets=_offsets(np.fromiter(map(len, self._rows), np.int64, len(self._rows))),
            conditions=condition_N.astype(np.int32),
            condition_names=tuple(self._names),
            sources=source_N.astype(np.int32),
            origins=Origins(tuple(self._files), file_N.astype(np.int32), line_N.copy()),
        )


def _to_json(prompt: Prompt) -> bytes:
    """All of a prompt but its condition and origin. Values that JSON does not have (Parquet's dates) become texts."""
    values = {
        "turns": [_plain_turn(turn) for turn in prompt.turns],
        "tools": prompt.tools,
        "system": prompt.system,
        "reference": prompt.reference,
        "weight": prompt.weight,
        "values": prompt.values,
    }
    return json.dumps(values, ensure_ascii=False, default=str).encode()


def _from_json(text: bytes, condition: str | None, origin: str) -> Prompt:
    values: dict[str, Any] = json.loads(text)
    turns = tuple(_turn_from_plain(turn) for turn in values.pop("turns"))
    return Prompt(turns, tuple(values.pop("tools")), condition=condition, origin=origin, **values)


def _plain_turn(turn: Turn) -> dict[str, Any]:
    """A turn as JSON values, without `learn` and `weight`: no loss is taken on a prompt."""
    plain: dict[str, Any] = {"role": turn.role, "content": turn.content}
    plain |= {
        name: value for name in ("name", "call_id", "input") if (value := getattr(turn, name)) is not None
    }
    if turn.tool_calls:
        plain["tool_calls"] = [[call.name, call.arguments, call.id] for call in turn.tool_calls]
    return plain


def _turn_from_plain(plain: Mapping[str, Any]) -> Turn:
    fields: dict[str, Any] = {
        **plain,
        "tool_calls": tuple(ToolCall(*call) for call in plain.get("tool_calls", ())),
    }
    return Turn(**fields)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
