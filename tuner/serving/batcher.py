"""The thread that generates: rows of all requests in one batch, which they join as they come."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from tuner.errors import UserError
from tuner.models.generate import unpacked
from tuner.models.live_batch import LiveBatch
from tuner.models.prompt_logprobs import prompt_logprobs
from tuner.serving.answer_row import AnswerRow
from tuner.serving.request_fields import RequestError

_SERVICE_UNAVAILABLE = 503


class Batcher:
    """Generates the answers of a model, which nobody else may use meanwhile.

    max_rows: rows generated together. max_slots: tokens whose keys and values are held at a time. One row is always
    taken; others wait in their order.
    """

    def __init__(self, model: nn.Module, *, max_rows: int, max_slots: int) -> None:
        self._model, self._max_rows, self._max_slots = model, max_rows, max_slots
        self._waiting: deque[AnswerRow] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self.running = 0
        """Rows that are generated now."""
        self.largest = 0
        """Most rows that were generated together."""
        self.steps = 0
        """Passes made so far."""
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[AnswerRow]) -> None:
        """Generate these rows. Raises RequestError after `close`."""
        with self._changed:
            if self._is_closed:
                raise _closing()
            self._waiting.extend(rows)
            self._changed.notify()

    def close(self) -> None:
        """End all rows; returns at once."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def join(self) -> None:
        """Wait until the thread has ended, after `close`."""
        self._thread.join()

    def _run(self) -> None:
        with torch.no_grad(), unpacked(self._model) as transformer:
            batch = LiveBatch(transformer)
            while (joining := self._next(batch)) is not None:
                rows = [*batch.rows, *joining]
                try:
                    _advance(transformer, batch, joining)
                    self.largest, self.steps = max(self.largest, len(rows)), self.steps + 1
                # whatever a pass raises, as when memory is short, belongs to its rows; the next ones may do
                except Exception as error:
                    _fail(rows, error)
                    batch = LiveBatch(transformer)
                self.running = len(batch.rows)
        with self._changed:
            _fail([*batch.rows, *self._waiting], _closing())

    def _next(self, batch: LiveBatch) -> list[AnswerRow] | None:
        """The rows that join now; waits where there is nothing to do. None once it is closed."""
        with self._changed:
            while not (self._is_closed or self._waiting or batch.rows):
                self._changed.wait()
            if self._is_closed:
                return None
            joining: list[AnswerRow] = []
            while self._waiting and self._has_room(batch, [*joining, self._waiting[0]]):
                row = self._waiting.popleft()
                if not row.was_cancelled:
                    joining.append(row)
            return joining

    def _has_room(self, batch: LiveBatch, rows: list[AnswerRow]) -> bool:
        running = len(batch.rows)
        if not running and len(rows) == 1:
            return True
        return running + len(rows) <= self._max_rows and batch.slots_with(rows) <= self._max_slots


def _advance(transformer: PreTrainedModel, batch: LiveBatch, joining: Sequence[AnswerRow]) -> None:
    """Read the prompts of new rows, and generate the next token of all."""
    for row in joining:
        if row.scores_prompt:
            row.prompt_tokens = prompt_logprobs(transformer, row.prompt, row.settings.num_likeliest)
    generated = [row for row in joining if row.settings.max_new_tokens]
    for row in joining:
        if not row.settings.max_new_tokens:
            row.end_empty()
    if generated:
        batch.join(generated)
    if batch.rows:
        batch.step()


def _fail(rows: Sequence[object], error: Exception) -> None:
    if not isinstance(error, RequestError | UserError):
        error = RequestError(f"generation failed: {type(error).__name__}: {error}"[:500], status=500)
    for row in rows:
        assert isinstance(row, AnswerRow)
        row.fail(error)


def _closing() -> RequestError:
    return RequestError("this server is shutting down", status=_SERVICE_UNAVAILABLE)
