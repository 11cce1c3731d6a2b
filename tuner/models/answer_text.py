"""The text of an answer while it is generated: piece by piece, ended by stop texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from tuner.data.tool_calls import longest_beginning

_INCOMPLETE = "�"
"""What bytes are decoded to that are no whole character."""


class AnswerText:
    """Joined, the pieces are the decoded answer up to its first stop text.

    A piece is held back while it may be the beginning of a character or of a stop text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), shown: Collection[int] = ()
    ) -> None:
        """shown: special tokens that stand in the text; all others are left out."""
        self._tokenizer, self._stops = tokenizer, stops
        special = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._hidden = frozenset(special) - frozenset(shown)
        self._ids: list[int] = []
        self._start = self._decoded = 0
        """Tokens from `_start` on are decoded again with each new one; those before `_decoded` are in the text."""
        self._held = ""
        self.stopped = False
        """Whether a stop text has ended the answer."""

    def push(self, token: int) -> str:
        """The text that is certain now."""
        if self.stopped or token in self._hidden:
            return ""
        self._ids.append(token)
        piece = self._new_text()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._start, self._decoded = self._decoded, len(self._ids)
        return self._release(piece)

    def finish(self) -> str:
        """The text that was held back."""
        if self.stopped:
            return ""
        released = self._release(self._new_text())
        held, self._held = self._held, ""
        return released + ("" if self.stopped else held)

    def _new_text(self) -> str:
        """Text of the tokens since `_decoded`."""
        # decoded behind others: alone, many tokenizers drop their leading space
        before = self._decode(self._ids[self._start : self._decoded])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def _release(self, piece: str) -> str:
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        count = longest_beginning(text, self._stops)
        self._held = text[len(text) - count :]
        return text[: len(text) - count]
