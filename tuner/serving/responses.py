"""The responses of both endpoints, in OpenAI's shapes: whole, or in chunks. vLLM's `token_ids` on request."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from tuner.data.conversation import ToolCall
from tuner.data.tool_calls import AnswerReader, identified
from tuner.models.live_batch import Token
from tuner.serving.answer_row import AnswerRow, Piece
from tuner.serving.served_model import AnswerRequest

_WORST = -9999.0
"""OpenAI's log-probability of what is as good as impossible; JSON has no infinities."""


class Choice:
    """One answer of a response, which grows by pieces."""

    def __init__(self, row: AnswerRow, request: AnswerRequest) -> None:
        self.row, self.request = row, request
        self.parts: list[str | ToolCall] = []
        self.tokens: list[Token] = []
        self.finish: str | None = None
        self.calls = 0
        self._reader = AnswerReader(request.tool_format)
        if request.beginning:  # the tokens behind it are generated
            self._reader.push(request.beginning)

    def add(self, piece: Piece) -> list[str | ToolCall]:
        """The texts and calls that a piece makes certain."""
        parts = self._reader.push(piece.text)
        if piece.finish is not None:
            parts += self._reader.finish()
        parts = [identified(part) for part in parts]
        self.calls += sum(isinstance(part, ToolCall) for part in parts)
        if piece.finish is not None:
            self.finish = "tool_calls" if self.calls and piece.finish == "stop" else piece.finish
        if piece.token is not None:
            self.tokens.append(piece.token)
        self.parts += parts
        return parts

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


class Response(ABC):
    """A response to one request. text_of: decodes a token by itself."""

    prefix: str
    """Of its id."""
    kind: str
    """OpenAI's name of the object."""
    chunk_kind: str

    def __init__(
        self, model: str, request: AnswerRequest, rows: Sequence[AnswerRow], text_of: Callable[[int], str]
    ) -> None:
        self._request, self._text_of = request, text_of
        self.choices = [Choice(row, request) for row in rows]
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    @property
    def is_complete(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and generated; end tokens count."""
        read = sum(map(len, self._request.prompts))
        generated = sum(choice.row.count for choice in self.choices)
        return {
            "prompt_tokens": read,
            "completion_tokens": generated,
            "total_tokens": read + generated,
        }

    def whole(self) -> dict[str, Any]:
        """The response once it is complete."""
        choices = [self._choice(choice) for choice in self.choices]
        if self._request.shows_ids:
            for values, choice in zip(choices, self.choices, strict=True):
                values["token_ids"] = [token.id for token in choice.tokens]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first token."""
        return []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks that a piece makes."""
        choice = self.choices[piece.index]
        deltas = self._deltas(choice, choice.add(piece), piece)
        return [self._chunk([delta]) for delta in deltas]

    def closing(self) -> list[dict[str, Any]]:
        """The chunk with the token counts, where the request wants it."""
        return [{**self._chunk([]), "usage": self.usage}] if self._request.counts_usage else []

    @abstractmethod
    def _choice(self, choice: Choice) -> dict[str, Any]:
        """A complete choice."""

    @abstractmethod
    def _deltas(self, choice: Choice, parts: list[str | ToolCall], piece: Piece) -> list[dict[str, Any]]:
        """What chunks say of a choice."""

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}


class ChatResponse(Response):
    """A chat completion."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        return [
            self._chunk([_delta(choice.row.index, {"role": "assistant", "content": ""})])
            for choice in self.choices
        ]

    def whole(self) -> dict[str, Any]:
        """The response; vLLM has the ids of a chat's one prompt beside its choices."""
        ids = {"prompt_token_ids": list(self._request.prompts[0])} if self._request.shows_ids else {}
        return {**super().whole(), **ids}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        calls = [part for part in choice.parts if isinstance(part, ToolCall)]
        message: dict[str, Any] = {"role": "assistant", "content": choice.text or (None if calls else "")}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        return {
            "index": choice.row.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish,
        }

    def _deltas(self, choice: Choice, parts: list[str | ToolCall], piece: Piece) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        first = choice.calls - sum(isinstance(part, ToolCall) for part in parts)
        for part in parts:
            if isinstance(part, str):
                content = {"content": part}
            else:
                content = {"tool_calls": [{"index": first, **_call(part)}]}
                first += 1
            deltas.append(_delta(choice.row.index, content))
        if self._request.has_logprobs and piece.token is not None:
            deltas = deltas or [_delta(choice.row.index, {})]
            deltas[0]["logprobs"] = self._logprobs([piece.token])
        if choice.finish is not None:
            deltas.append({**_delta(choice.row.index, {}), "finish_reason": choice.finish})
        return deltas

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._request.has_logprobs:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: Token) -> dict[str, Any]:
        likeliest = [self._logprob(*other) for other in token.likeliest]
        return {**self._logprob(token.id, token.logprob), "top_logprobs": likeliest}

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text_of(token)
        return {"token": text, "logprob": max(logprob, _WORST), "bytes": list(text.encode())}


class CompletionResponse(Response):
    """A completion of a text."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def opening(self) -> list[dict[str, Any]]:
        if not self._request.echo or self._request.has_logprobs:
            return []  # with log-probabilities, the prompt comes with the first token
        return [self._chunk([self._values(choice, self._prompt(choice))]) for choice in self.choices]

    def _prompt(self, choice: Choice) -> str:
        """The prompt's text, where it is part of the response."""
        return "".join(map(self._text_of, choice.row.prompt)) if self._request.echo else ""

    def _choice(self, choice: Choice) -> dict[str, Any]:
        prompt = choice.row.prompt_tokens
        tokens = [*zip(choice.row.prompt, prompt, strict=False), *_with_own_ids(choice.tokens)]
        values = self._values(choice, self._prompt(choice) + choice.text, tokens)
        ids = {"prompt_token_ids": list(choice.row.prompt)} if self._request.shows_ids else {}
        return {**values, **ids}

    def _deltas(self, choice: Choice, parts: list[str | ToolCall], piece: Piece) -> list[dict[str, Any]]:
        tokens: list[tuple[int, Token | None]] = [] if piece.token is None else _with_own_ids([piece.token])
        text = "".join(part for part in parts if isinstance(part, str))
        if self._request.echo and self._request.has_logprobs and len(choice.tokens) <= 1:
            tokens = [*zip(choice.row.prompt, choice.row.prompt_tokens, strict=False), *tokens]
            text = self._prompt(choice) + text
        values = self._values(choice, text, tokens)
        return [values] if text or choice.finish or self._request.has_logprobs else []

    def _values(
        self, choice: Choice, text: str, tokens: Sequence[tuple[int, Token | None]] = ()
    ) -> dict[str, Any]:
        return {
            "index": choice.row.index,
            "text": text,
            "logprobs": self._logprobs(tokens),
            "finish_reason": choice.finish,
        }

    def _logprobs(self, tokens: Sequence[tuple[int, Token | None]]) -> dict[str, Any] | None:
        """A token without a log-probability is the first of a prompt."""
        if not self._request.has_logprobs:
            return None
        texts = [self._text_of(number) for number, _ in tokens]
        offsets = [0]
        for text in texts[:-1]:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [None if token is None else max(token.logprob, _WORST) for _, token in tokens],
            "top_logprobs": [None if token is None else self._likeliest(token) for _, token in tokens],
            "text_offset": offsets[: len(texts)],
        }

    def _likeliest(self, token: Token) -> dict[str, float]:
        likeliest = {self._text_of(number): max(logprob, _WORST) for number, logprob in token.likeliest}
        return {**likeliest, self._text_of(token.id): max(token.logprob, _WORST)}


def _with_own_ids(tokens: Sequence[Token]) -> list[tuple[int, Token | None]]:
    return [(token.id, token) for token in tokens]


def _delta(index: int, content: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": content, "logprobs": None, "finish_reason": None}


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
