"""A real HTTP server in place of a judge's API, whose behavior a test writes."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Behavior = Callable[[dict[str, Any], int], Any]
"""(body, number of the request from 1 on) -> the text of a completion, a Response, or an awaitable of either."""


def completion(text: str | None, **choice: Any) -> Response:
    return JSONResponse(
        {
            "choices": [{"message": {"role": "assistant", "content": text}, **choice}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
        }
    )


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two answers, as a request shows them."""
    first, second = re.findall(
        r"^<<<answer [12] \w+>>>\n(.*?)\n<<<end of", body["messages"][1]["content"], re.DOTALL | re.MULTILINE
    )
    return first, second


def prefers(word: str) -> Behavior:
    """A judge that decides for the answer with a word, and for none where both or neither have it."""

    def judge(body: dict[str, Any], number: int) -> str:
        has = [word in answer for answer in shown(body)]
        return "Both are short.\n\nVerdict: " + ("tie" if has[0] == has[1] else "1" if has[0] else "2")

    return judge


class JudgeServer:
    """The server: its address, what it was asked, and how it behaves."""

    def __init__(self) -> None:
        self.behavior: Behavior = prefers("late")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        app = Starlette(routes=[Route("/v1/chat/completions", self._answer, methods=["POST"])])
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        )

    async def _answer(self, request: Request) -> Response:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            body = json.loads(await request.body())
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            self.times.append(time.monotonic())
            answer = self.behavior(body, len(self.bodies))
            if isinstance(answer, Awaitable):
                answer = await answer
            return answer if isinstance(answer, Response) else completion(answer)
        finally:
            self.at_once -= 1

    @contextmanager
    def running(self) -> Iterator["JudgeServer"]:
        thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        thread.start()
        try:
            while not self._server.started:
                time.sleep(0.01)
            yield self
        finally:
            self._server.should_exit = self._server.force_exit = True
            thread.join()


async def later(seconds: float, text: str) -> str:
    await asyncio.sleep(seconds)
    return text
