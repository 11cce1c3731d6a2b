"""A small HTTP server that speaks vLLM's protocol, and fails as told; its "model" is arithmetic."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Reply = Callable[[dict[str, Any]], Response | None]
"""Takes a completion request; None: the ordinary answer."""


LOGPROB = -11.0
"""Log-probability of every token: near the mean of what the embedded model gives random ones, and never right."""


class StandIn:
    """Its state, and what it was asked. Every answer has noise of its own: none is given twice."""

    def __init__(self, key: str | None = None) -> None:
        self.key = key
        self.adapters: dict[str, str] = {}
        self.completions: list[dict[str, Any]] = []
        """Requests that were answered."""
        self.replies: Iterator[Reply] = iter(())
        """What the next requests of completions get instead."""
        self.end = 2
        self.answers_left: int | None = None
        """Answers after which its process dies; None: as many as it is asked for."""
        self._noise = itertools.count()
        self._lock = threading.Lock()
        routes = [
            Route("/health", lambda request: Response()),
            Route("/v1/models", self._models),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[str]:
        """Serve on loopback; gives the URL."""
        config = uvicorn.Config(self.app, port=port, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

    def _refused(self, request: Request) -> Response | None:
        authorized = self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"
        return None if authorized else failure(401, "Unauthorized")

    async def _models(self, request: Request) -> Response:
        names = ["base", *self.adapters]
        return self._refused(request) or JSONResponse({"data": [{"id": name} for name in names]})

    async def _load(self, request: Request) -> Response:
        body = await request.json()
        if body["lora_name"] in self.adapters:
            return failure(400, "already loaded")
        self.adapters[body["lora_name"]] = body["lora_path"]
        return self._refused(request) or Response("Success")

    async def _unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        return Response("Success") if self.adapters.pop(name, None) else failure(404, f"no {name}")

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        with self._lock:
            reply = next(self.replies, None)
        if reply is not None and (response := reply(body)) is not None:
            return response
        if body["model"] not in ("base", *self.adapters):
            return failure(404, f"The model `{body['model']}` does not exist.")
        if self.answers_left is not None:
            self.answers_left -= 1
            if self.answers_left < 0:
                os._exit(1)
        self.completions.append(body)
        return JSONResponse(completion(self._tokens(body)))

    def _tokens(self, body: dict[str, Any]) -> list[int]:
        noise = next(self._noise)
        length = 1 + (body["seed"] + noise) % body["max_tokens"]
        tokens = [100 + (body["seed"] + noise * 31 + place * 17) % 900 for place in range(length)]
        return tokens if length == body["max_tokens"] else [*tokens, self.end]


def completion(tokens: list[int], logprob: float = LOGPROB, reason: str | None = None) -> dict[str, Any]:
    reason = reason or ("stop" if tokens[-1] == 2 else "length")
    logprobs = {"token_logprobs": [logprob] * len(tokens)}
    return {"choices": [{"token_ids": tokens, "logprobs": logprobs, "finish_reason": reason}]}


class Late(Response):
    """A response that comes after some seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(b"{}")
        self._seconds = seconds

    async def __call__(self, *arguments: Any) -> None:
        await asyncio.sleep(self._seconds)
        await super().__call__(*arguments)


def cut_short() -> Response:
    """A response whose connection is lost in its middle."""
    return Response(b'{"choices"', headers={"content-length": "1000"})


def failure(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status)


if __name__ == "__main__":
    port = int(sys.argv[sys.argv.index("--port") + 1])
    stand_in = StandIn(os.environ.get("VLLM_API_KEY"))
    if "--answers" in sys.argv:
        stand_in.answers_left = int(sys.argv[sys.argv.index("--answers") + 1])
    uvicorn.run(stand_in.app, port=port, log_level="error", lifespan="off")
