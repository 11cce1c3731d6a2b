"""An OpenAI-style chat-completions endpoint: requests, retries and rate. The only file that imports httpx2."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httpx2

from tuner.config.feedback_config import Judge
from tuner.data.turns import is_object
from tuner.errors import UserError

_TEMPORARY = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529))
"""Statuses after which the same request may succeed."""
_OF_THE_REQUEST = frozenset((400, 413, 422))
"""Statuses that may be about one request alone: a text that is too long, or that a filter refuses."""
_LONGEST_DELAY = 60.0
"""Seconds of our own backoff."""
_LONGEST_WAIT = 600.0
"""Seconds of a Retry-After that are waited for; whoever is asked to wait longer is told so instead."""
_LARGEST_REPLY = 16 * 2**20
"""Bytes."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LONGEST_QUOTE = 200
"""Characters of a server's message that are shown."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A chat completion."""

    text: str
    raw: str
    """The body as it came."""
    prompt_tokens: int
    """0 where the server does not count."""
    completion_tokens: int
    is_cut: bool
    """Whether it ended at max_tokens."""


class RefusedRequestError(UserError):
    """The server refuses this request, which says nothing about others."""


class StoppedError(Exception):
    """The request was not sent, because others failed."""


class _TemporaryError(Exception):
    """The same request may succeed later; retry_after: seconds that the server asks to wait."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class ChatEndpoint:
    """The endpoint of a judge, as an async context manager.

    first_delay: seconds before the first retry, twice as long before each further one.
    """

    def __init__(self, judge: Judge, first_delay: float = 1.0) -> None:
        self._judge, self._first_delay = judge, first_delay
        self._url = f"{judge.url}/chat/completions"
        self._key = read_key(judge)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(judge.timeout),
            limits=httpx2.Limits(max_connections=judge.concurrency),
            # a proxy of the environment cannot reach this machine's own server
            trust_env=urlsplit(judge.url).hostname not in _LOOPBACK,
        )
        self._stopping = asyncio.Event()
        self._next_turn = 0.0
        """Before this time, by the monotonic clock, nothing is sent."""
        self._random = random.Random()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """The reply to a request, sent again after failures of the server or the network.

        Raises RefusedRequestError where the server refuses this request, and UserError where no request can succeed.
        """
        failure = _TemporaryError("")
        for attempt in range(self._judge.retries + 1):
            if attempt:
                await self._pause(self._delay(attempt, failure))
            await self._wait_for_turn()
            try:
                return await self._send(body)
            except _TemporaryError as error:
                failure = error
        raise UserError(
            f"{self._url}: no reply after {self._judge.retries + 1} attempts (last: {failure}); what was answered is "
            "stored: check that the server runs, then run the same command again"
        )

    def stop(self) -> None:
        """Send nothing any more; replies on their way still arrive. To be called in the thread of the requests."""
        self._stopping.set()

    # when

    def _delay(self, attempt: int, failure: _TemporaryError) -> float:
        """Seconds before a retry: exponential, with jitter, so that requests that failed together part."""
        backoff = min(_LONGEST_DELAY, self._first_delay * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1)
        asked_for = failure.retry_after or 0.0
        if asked_for > _LONGEST_WAIT:
            raise UserError(
                f"{self._url}: the server asks to wait for {asked_for:,.0f} s ({failure}); what was answered is "
                "stored: run the same command again then"
            )
        if asked_for:  # it limits all requests, not this one alone
            self._next_turn = max(self._next_turn, time.monotonic() + asked_for)
        return max(backoff, asked_for)

    async def _wait_for_turn(self) -> None:
        """Until the rate allows a request."""
        now = time.monotonic()
        turn = max(now, self._next_turn)
        if self._judge.requests_per_minute is not None:
            self._next_turn = turn + 60 / self._judge.requests_per_minute
        await self._pause(turn - now)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._stopping.wait()
        except TimeoutError:
            return
        raise StoppedError

    # what

    async def _send(self, body: Mapping[str, Any]) -> Reply:
        try:
            # httpx's own time-outs are of single reads: a server that sends a byte now and then would never end
            async with asyncio.timeout(self._judge.timeout):
                status, headers, content = await self._post(json.dumps(body).encode())
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise _TemporaryError(f"no complete reply within {self._judge.timeout:g} s") from error
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise _TemporaryError(f"{type(error).__name__}: {self._quote(str(error))}") from error
        if status == 200:
            return self._completion(content)
        raise self._failure(status, headers, content)

    async def _post(self, body: bytes) -> tuple[int, httpx2.Headers, str]:
        content = bytearray()
        async with self._client.stream("POST", self._url, content=body) as response:
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > _LARGEST_REPLY:
                    raise _TemporaryError(f"its reply has more than {_LARGEST_REPLY:,} bytes")
        return response.status_code, response.headers, content.decode(errors="replace")

    def _completion(self, content: str) -> Reply:
        try:
            return read_completion(content)
        except ValueError as error:
            raise _TemporaryError(f"{error}: {self._quote(content)}") from error

    def _failure(self, status: int, headers: httpx2.Headers, content: str) -> Exception:
        response = f"HTTP {status}: {self._quote(_message(content))}"
        if status in _TEMPORARY:
            return _TemporaryError(response, _retry_after(headers.get("Retry-After", "")))
        if status in _OF_THE_REQUEST:
            return RefusedRequestError(f"{self._url}: {response}; see the judge's model and options")
        if status in (401, 403):
            name = self._judge.api_key_env
            remedy = (
                f"see the key in {name}" if name else "name the environment variable of its key: api_key_env"
            )
            return UserError(f"{self._url}: {response}; {remedy}")
        if 300 <= status < 400:  # not followed: the key would go along
            place = self._quote(headers.get("Location", "nowhere"))
            return UserError(f"{self._url}: redirects to {place}; write the judge's final url")
        return UserError(f"{self._url}: {response}; see the judge's url and model")

    def _quote(self, text: str) -> str:
        """Some of a text of the server's, which may repeat the key."""
        if self._key:
            text = text.replace(self._key, "...")
        return " ".join(text.split())[:_LONGEST_QUOTE] or "no message"


def read_key(judge: Judge) -> str:
    """The API key in the environment; "" where none is named. Raises UserError, without the key, where it is no key."""
    if judge.api_key_env is None:
        return ""
    key = os.environ.get(judge.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"{judge.api_key_env}: not set; the judge's api_key_env names it, so set it to the API key"
        )
    if not key.isascii() or not key.isprintable():  # HTTP's own error would show it
        raise UserError(
            f"{judge.api_key_env}: has characters that no HTTP header can hold; set it to the API key"
        )
    return key


def read_completion(content: str) -> Reply:
    """The body of a chat completion. Raises ValueError where it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError("its reply is not JSON") from error
    choices = value.get("choices") if is_object(value) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if is_object(choice) else None
    if not is_object(choice) or not is_object(message):
        raise ValueError("its reply is no chat completion")
    usage = value.get("usage")
    counts = usage if is_object(usage) else {}
    text = message.get("content")
    return Reply(
        # null beside a refusal, or where all tokens went into reasoning
        text=text if isinstance(text, str) else "",
        raw=content,
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
        is_cut=choice.get("finish_reason") == "length",
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**40 else 0


def _message(content: str) -> str:
    """The message in the body of an error, or the body."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    error: object = value.get("error", value) if is_object(value) else value
    message = error.get("message", error) if is_object(error) else error
    return str(cast("object", message))


def _retry_after(value: str) -> float | None:
    """Seconds of a Retry-After, which has seconds or a date; None for neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
