"""HTTP client of a vLLM server: completions of token ids, adapters loaded and unloaded.

Only the standard library is needed, and no proxy is asked: the server is this machine's or a neighbor's.
"""

from __future__ import annotations

import http.client
import json
import os
import re
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np

from tuner.errors import UserError
from tuner.printable import printable

KEY = "VLLM_API_KEY"
"""Environment variable with the server's key; vLLM's own."""


@contextmanager
def keep_key(url: str, key: str) -> Generator[None]:
    """Keep a server's key in a file for this user's clients on this machine, as long as the context lasts."""
    file = _key_file(url)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # an old one may be readable by others
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(key)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _kept_key(url: str) -> str | None:
    try:
        return _key_file(url).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _key_file(url: str) -> Path:
    folder = Path(os.environ.get("TUNER_CACHE") or "~/.cache/tuner").expanduser()
    return folder / f"vllm-{re.sub('[^a-z0-9.]', '-', urlsplit(url).netloc.lower())}.key"


class ServerAwayError(Exception):
    """The server cannot be reached, died, is overloaded or too slow: the same request may succeed later."""


class UnknownModelError(Exception):
    """The server has no model of this name: it has been started anew, or somebody unloaded the adapter."""


@dataclass(frozen=True, eq=False)
class Completion:
    """A server's answer to one prompt."""

    tokens: np.ndarray
    """int32 [tokens], with the token that ended it."""
    logprobs: np.ndarray
    """float32 [tokens]"""
    reason: str
    """Why it ended: "stop" or "length"."""


class VLLMClient:
    """Sends requests to one server; threads may share it."""

    def __init__(self, url: str, *, timeout: float, concurrency: int = 1, key: str | None = None) -> None:
        """timeout: seconds for an answer. key: the server's; None: that of $VLLM_API_KEY or `keep_key`, if any."""
        parts = urlsplit(url)
        self.url = url.rstrip("/")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._timeout, self._concurrency = parts.netloc, timeout, concurrency
        self._key = key or os.environ.get(KEY)

    def is_ready(self) -> bool:
        """Whether the server answers requests now. Raises UserError where it refuses this client."""
        try:
            self._request("GET", "/health")
            self.models()  # /health needs no key
        except ServerAwayError:
            return False
        return True

    def models(self) -> list[str]:
        """Names of the base and of the loaded adapters. Raises ServerAwayError, and UserError where it is no vLLM."""
        data = self._json("GET", "/v1/models").get("data")
        if not isinstance(data, list):
            raise UserError(
                f"{self.url}: /v1/models lists no models, so this is no vLLM server; correct the url"
            )
        return [str(model["id"]) for model in cast("list[Any]", data)]

    def load_adapter(self, name: str, folder: str) -> None:
        """Load a PEFT folder, which the server must see under the same path. Raises ServerAwayError and UserError."""
        self._request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter; one that is not loaded is none. Raises ServerAwayError."""
        try:
            self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except UnknownModelError:
            return

    def complete(
        self, requests: Sequence[dict[str, Any]], finished: Callable[[int, Completion], None]
    ) -> None:
        """Send requests of /v1/completions, `concurrency` at a time; `finished` takes the index and answer of each.

        Raises ServerAwayError, UnknownModelError or UserError at the first that fails, after those under way.
        """
        if not requests:
            return
        with ThreadPoolExecutor(min(self._concurrency, len(requests))) as pool:
            futures = {
                pool.submit(self._complete_one, request): index for index, request in enumerate(requests)
            }
            wait(futures, return_when=FIRST_EXCEPTION)
            pool.shutdown(cancel_futures=True)  # waits for the requests under way
        errors: list[BaseException] = []
        for future, index in futures.items():
            if error := _error_of(future):
                errors.append(error)
            elif not future.cancelled():
                finished(index, future.result())
        if errors:  # a wrong request stays wrong, so it is not hidden behind a lost connection
            raise next((error for error in errors if isinstance(error, UserError)), errors[0])

    def _complete_one(self, request: dict[str, Any]) -> Completion:
        answer = self._json("POST", "/v1/completions", request)
        try:
            choice = answer["choices"][0]
            tokens = np.array(choice["token_ids"], dtype=np.int32)
            logprobs = np.array(choice["logprobs"]["token_logprobs"], dtype=np.float32)
            reason = choice["finish_reason"]
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise self._no_answer(f"it lacks token_ids or logprobs: {error!r}") from error
        if reason not in ("stop", "length"):  # "abort": it is being shut down
            raise ServerAwayError(f"an answer ended by {printable(str(reason))!r}")
        if tokens.ndim != 1 or tokens.shape != logprobs.shape or not len(tokens):
            raise self._no_answer(f"it has {tokens.shape} tokens and {logprobs.shape} log-probabilities")
        if len(tokens) > request["max_tokens"] or (tokens < 0).any():
            raise self._no_answer(f"{len(tokens)} tokens, where {request['max_tokens']} were asked for")
        if not np.isfinite(logprobs).all() or (logprobs > 1e-3).any():
            raise self._no_answer("it has log-probabilities that are none")
        return Completion(tokens, logprobs, reason)

    def _no_answer(self, reason: str) -> UserError:
        return UserError(
            f"{self.url}: an answer of this server is none ({printable(reason)[:200]}); vLLM 0.20 or newer is needed"
        )

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        content = self._request(method, path, body)
        try:
            value = json.loads(content)
        except ValueError as error:
            raise self._no_answer(f"{path}: no JSON") from error
        if not isinstance(value, dict):
            raise self._no_answer(f"{path}: no JSON object")
        return cast("dict[str, Any]", value)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The content of a successful response."""
        headers = {"Content-Type": "application/json"}
        # read each time: a server that was started anew may have another
        if key := self._key or _kept_key(self.url):
            headers["Authorization"] = f"Bearer {key}"
        # a connection for each: the server closes idle ones, and a lost one could not be told from a died server
        connection = self._kind(self._host, timeout=self._timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            reason = (
                "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            )
            raise ServerAwayError(printable(reason)) from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise self._refusal(path, response.status, content)
        return content

    def _refusal(self, path: str, status: int, content: bytes) -> Exception:
        """What a status other than success means."""
        reason = printable(_message(content))[:300]
        if status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
            return UserError(f"{self.url}: the server wants a key; set {KEY} to the one it was started with")
        if status == http.client.NOT_FOUND and path.startswith(("/v1/completions", "/v1/unload")):
            return UnknownModelError(reason)
        if status in (http.client.NOT_FOUND, http.client.METHOD_NOT_ALLOWED):
            return UserError(
                f"{self.url}: {path} is refused ({reason}); it must be a server that `tuner serve-rollouts` started, "
                "and see the run's folder under the same path"
            )
        if status == http.client.TOO_MANY_REQUESTS or status >= http.client.INTERNAL_SERVER_ERROR:
            return ServerAwayError(f"status {status}: {reason}")
        return UserError(f"{self.url}: {path} refuses this request ({status}: {reason})")


def _error_of(future: Future[Completion]) -> BaseException | None:
    return None if future.cancelled() else future.exception()


def _message(content: bytes) -> str:
    """The message of a server's error, or its whole content."""
    try:
        value: Any = json.loads(content)
        return str(value["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return content.decode(errors="replace")
