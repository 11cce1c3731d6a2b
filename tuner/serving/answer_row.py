"""One answer of a request, as the batch generates it and the response receives it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tuner.models.answer_text import AnswerText
from tuner.models.live_batch import RowSettings, Token

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What is new of an answer."""

    index: int
    """Of the answer in its request."""
    text: str = ""
    token: Token | None = None
    finish: Finish | None = None
    """Why the answer ends with this piece."""
    error: Exception | None = None
    """Why there will be no more, where it has failed."""


class AnswerRow:
    """A row of the batch that sends its pieces on. Used by the thread that generates, but for `cancel`."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        settings: RowSettings,
        *,
        seed: int,
        ends: Collection[int],
        text: AnswerText,
        shown: Collection[int],
        send: Callable[[Piece], None],
        scores_prompt: bool = False,
    ) -> None:
        """seed: with the index, of the answer's noise. ends: tokens that end it; those in `shown` are in its text.

        scores_prompt: whether the log-probabilities of the prompt's tokens are wanted, too.
        """
        self.index, self.prompt, self.settings, self.scores_prompt = index, prompt, settings, scores_prompt
        self.prompt_tokens: list[Token | None] = []
        """The prompt's tokens; the first has no log-probability."""
        self.count = 0
        """Tokens generated."""
        self._ends, self._text, self._shown, self._send = ends, text, shown, send
        # as `uniforms`: the same answers as `tuner chat` and a rollout of this seed
        self._noise = np.random.default_rng((seed, 0, index))
        self.was_cancelled = False

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves the batch with its next token."""
        self.was_cancelled = True

    def noise(self) -> float:
        return float(self._noise.random())

    def take(self, token: Token) -> bool:
        """Send a token's text on; returns whether another token is wanted."""
        if self.was_cancelled:
            return False
        self.count += 1
        ended = token.id in self._ends
        text = "" if ended and token.id not in self._shown else self._text.push(token.id)
        finish: Finish | None = "stop" if ended or self._text.stopped else None
        if finish is None and self.count == self.settings.max_new_tokens:
            finish = "length"
        if finish is not None:
            text += self._text.finish()
            finish = "stop" if self._text.stopped else finish
        self._send(Piece(self.index, text, token, finish))
        return finish is None

    def end_empty(self) -> None:
        """End it without a token, where none was asked for."""
        self._send(Piece(self.index, finish="length"))

    def fail(self, error: Exception) -> None:
        self._send(Piece(self.index, error=error))
