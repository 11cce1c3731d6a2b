"""Who may ask: clients of this machine that know the token, and no page of a browser that comes from elsewhere."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tuner.errors import UserError
from tuner.printable import half_character
from tuner.serving.request_fields import RequestError, as_refusal

Handler = Callable[[Request], Awaitable[Response]]
_OWN_NAMES = ("127.0.0.1", "localhost", "::1")
_LONGEST_BODY = 16 * 2**20
"""Bytes."""


class Guard:
    """Opens endpoints to whoever may ask, and answers all errors in OpenAI's shape."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    @property
    def handlers(self) -> Mapping[Any, Any]:
        """Starlette's exception handlers."""
        return {RequestError: _refuse, UserError: _refuse, HTTPException: _refuse_path}

    def open(self, handler: Handler) -> Handler:
        """The handler, for requests that pass. Raises RequestError for others."""

        async def guarded(request: Request) -> Response:
            self._check(request)
            return await handler(request)

        return guarded

    def _check(self, request: Request) -> None:
        # another site's name that was pointed at this address; ports differ behind tunnels
        if _host(f"//{request.headers.get('host', '')}") not in _OWN_NAMES:
            raise RequestError("this server answers at 127.0.0.1 only", status=403)
        origin = request.headers.get("origin")
        if origin is not None and _host(origin) not in _OWN_NAMES:
            raise RequestError("this server does not answer pages of other sites", status=403)
        if self._token is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            token.strip().encode(), self._token.encode()
        ):
            raise RequestError(
                "the API key is wrong; send the token that the server was started with",
                status=401,
                code="invalid_api_key",
            )


def _host(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:  # brackets that do not close
        return None


async def read_body(request: Request) -> Any:
    """The JSON of a request. Raises RequestError where it is none, too long, or has half of a character anywhere."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LONGEST_BODY:
            raise RequestError(f"a request has at most {_LONGEST_BODY:,} bytes", status=413)
    try:
        values = json.loads(body)
        half = half_character(json.dumps(values, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body of a request is JSON, and this is none: {error}"[:300]) from error
    if half is not None:  # no tokenizer reads it, and no response can repeat it
        raise RequestError(
            f"the body of a request has {half}, half of a character; send its pair or leave it out"
        )
    return values


async def _refuse(request: Request, error: Exception) -> Response:
    refusal = as_refusal(error)
    return JSONResponse(refusal.body, refusal.status)


async def _refuse_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    return JSONResponse(refusal.body, refusal.status)
