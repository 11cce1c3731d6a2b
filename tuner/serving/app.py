"""The HTTP side: OpenAI's endpoints for one chat model, answered from a batch that all requests share."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tuner.errors import UserError
from tuner.serving import responses
from tuner.serving.answer_row import AnswerRow, Piece
from tuner.serving.batcher import Batcher
from tuner.serving.guard import Guard, read_body
from tuner.serving.request_fields import RequestError, RequestFields, as_refusal
from tuner.serving.served_model import AnswerRequest, ServedModel


class ChatApp:
    """The endpoints. `app` is the ASGI application."""

    def __init__(self, model: ServedModel, batcher: Batcher, token: str | None) -> None:
        """token: what requests must carry as their bearer; None: nothing."""
        self._model, self._batcher = model, batcher
        guard = Guard(token)
        self.app = Starlette(
            routes=[
                Route("/health", guard.open(self._health)),
                Route("/v1/models", guard.open(self._models)),
                Route("/v1/chat/completions", guard.open(self._chat), methods=["POST"]),
                Route("/v1/completions", guard.open(self._complete), methods=["POST"]),
            ],
            exception_handlers=guard.handlers,
        )

    async def _health(self, request: Request) -> Response:
        return JSONResponse({})

    async def _models(self, request: Request) -> Response:
        return models_response(self._model.name, self._model.max_length)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, self._model.read_chat, responses.ChatResponse)

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, self._model.read_completion, responses.CompletionResponse)

    async def _answer(
        self,
        request: Request,
        read: Callable[[RequestFields], AnswerRequest],
        kind: type[responses.Response],
    ) -> Response:
        fields = RequestFields(await read_body(request))
        asked = read(fields)
        fields.refuse_unread()
        pieces = _Pieces()
        rows = self._model.rows(asked, pieces.send)
        response = kind(self._model.name, asked, rows, self._model.text_of)
        self._batcher.submit(rows)
        if asked.stream:
            events = _events(response, pieces, rows)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        try:
            await _unless_gone(request, _collect(response, pieces))
        finally:
            for row in rows:
                row.cancel()
        return JSONResponse(response.whole())


class _Pieces:
    """The pieces of a request's answers, from the thread that generates to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece] = asyncio.Queue()

    def send(self, piece: Piece) -> None:
        """Called by the thread that generates."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def next(self) -> Piece:
        """The next piece. Raises what has made its answer fail."""
        piece = await self._queue.get()
        if piece.error is not None:
            raise piece.error
        return piece


async def _collect(response: responses.Response, pieces: _Pieces) -> None:
    while not response.is_complete:
        piece = await pieces.next()
        response.choices[piece.index].add(piece)


async def _unless_gone(request: Request, work: Awaitable[None]) -> None:
    """Do the work while the client waits for it. Raises RequestError where it has gone."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError("the client has gone", status=499)
        task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(response: responses.Response, pieces: _Pieces, rows: list[AnswerRow]) -> AsyncIterator[str]:
    """A stream's server-sent events; one that its client leaves is cancelled."""
    try:
        for chunk in response.opening():
            yield _event(chunk)
        while not response.is_complete:
            for chunk in response.chunks(await pieces.next()):
                yield _event(chunk)
        for chunk in response.closing():
            yield _event(chunk)
    except (RequestError, UserError) as error:
        yield _event(as_refusal(error).body)
    finally:
        for row in rows:
            row.cancel()
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def models_response(name: str, max_length: int | None) -> Response:
    """The list of /v1/models, with vLLM's max_model_len."""
    model = {"id": name, "object": "model", "created": 0, "owned_by": "tuner", "max_model_len": max_length}
    return JSONResponse({"object": "list", "data": [model]})
