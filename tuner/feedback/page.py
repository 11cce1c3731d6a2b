"""The page on which people label: two answers, blind and in random order, under the guideline of their condition.

Whatever a row holds is shown as text: templates escape everything, and the content security policy lets no script run
but `page.js`. The page needs none: every button submits a form, and the script only presses buttons by their keys.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, cast
from urllib.parse import parse_qs

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from tuner.errors import UserError
from tuner.feedback.agreement import report
from tuner.feedback.queue import Queue
from tuner.feedback.store import CHOICES, Choice, Label, Showing
from tuner.printable import printable, printable_json

_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_FORM = 65_536
"""Bytes of a form, most of it a comment."""
_WEEK = 7 * 24 * 3600
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # "no-referrer" would make the Origin of our own forms "null"
    "Cache-Control": "no-store",  # a page from the cache would show a pair that is labeled already
}
_NOTICES = {
    "stored": "That pair had been labeled already, perhaps in another tab: its first label stands. Undo changes it.",
    "waits": "Nothing was stored: that label had been taken back, and its pair waits to be labeled again.",
    "undone": "That label had been taken back already.",
}


class LabelPage:
    """The pages of one annotator. `app` is the ASGI application.

    token: a secret that the address opened first carries; then it is in a cookie, and in every form. port: of the
    loopback address that the page is served at, which requests must name as their host and forms as their origin.
    """

    def __init__(self, queue: Queue, annotator: str, token: str, port: int):
        self._queue, self._annotator, self._token = queue, annotator, token
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._cookie = f"tuner-label-{port}"  # cookies of all ports share one jar
        self._templates = Environment(
            loader=FileSystemLoader(_TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=_finalize,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["json"] = printable_json
        self.app = Starlette(
            routes=[
                Route("/", self.show_pair),
                Route("/label", self.label, methods=["POST"]),
                Route("/undo", self.undo, methods=["POST"]),
                Route("/figures", self.show_figures),
                Route("/page.css", _file("page.css", "text/css")),
                Route("/page.js", _file("page.js", "text/javascript")),
            ],
            exception_handlers={UserError: _explain},
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=self._guard)],
        )

    @property
    def address(self) -> str:
        """The path that opens the page in a browser."""
        return f"/?token={self._token}"

    async def _guard(self, request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        """Answer only requests that know the token, under our own name, and forms only from our own pages."""
        response = self._refusal(request) or self._entrance(request) or await answer(request)
        response.headers.update(_HEADERS)
        return response

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if host not in self._hosts:  # another site's name that was pointed at this address
            return PlainTextResponse("This page is served at 127.0.0.1 only.", 403)
        if not any(
            map(self._is_token, (request.query_params.get("token"), request.cookies.get(self._cookie)))
        ):
            return PlainTextResponse("Open the address that tuner label printed when it was started.", 403)
        if request.method == "POST" and request.headers.get("origin") != f"http://{host}":
            return PlainTextResponse("This form was sent from another page. Nothing was stored.", 403)
        return None

    def _entrance(self, request: Request) -> Response | None:
        """Move the token from the address, where histories keep it, to a cookie."""
        if request.method != "GET" or "token" not in request.query_params:
            return None
        response = RedirectResponse(request.url.path, 303)
        response.set_cookie(self._cookie, self._token, max_age=_WEEK, httponly=True, samesite="lax")
        return response

    def _is_token(self, token: str | None) -> bool:
        return token is not None and hmac.compare_digest(token.encode(), self._token.encode())

    # pages

    async def show_pair(self, request: Request) -> Response:
        """The pair that waits for a label."""
        showing = self._queue.next(self._annotator)
        own = [
            label
            for label in self._queue.store.labels()
            if label.annotator == self._annotator and label.item in self._queue.candidates
        ]
        return self._render(
            "pair.html",
            pair=None if showing is None else self._pair(showing),
            showing=showing,
            last=own[-1].id if own else None,
            comment="" if showing is None else self._queue.store.earlier_comment(showing),
            notice=_NOTICES.get(request.query_params.get("notice", "")),
            **_progress(own, self._queue.remaining(self._annotator)),
        )

    def _pair(self, showing: Showing) -> dict[str, Any]:
        """What the page may show of a candidate: neither origins nor gold."""
        candidate = self._queue.candidates[showing.item]
        answers = candidate.answers[::-1] if showing.swapped else candidate.answers
        return {
            "prompt": candidate.prompt,
            "condition": candidate.condition,
            "guideline": candidate.guideline,
            "left": answers[0],
            "right": answers[1],
        }

    async def show_figures(self, request: Request) -> Response:
        """The figures of all annotators; the page loads itself again every few seconds."""
        candidates = self._queue.candidates
        return self._render("figures.html", **report(self._queue.store.labels(), candidates))

    def _render(self, template: str, **values: Any) -> Response:
        values |= {"annotator": self._annotator, "token": self._token}
        return HTMLResponse(self._templates.get_template(template).render(values))

    # forms

    async def label(self, request: Request) -> Response:
        """Store a label, then show the next pair."""
        form = await self._read_form(request)
        if isinstance(form, Response):
            return form
        choice = form.get("choice", "")
        if choice not in CHOICES or not _is_number(form.get("showing", "")):
            return PlainTextResponse(f"A label is one of {', '.join(CHOICES)}. Nothing was stored.", 400)
        comment = form.get("comment", "").strip()
        stored = self._queue.store.submit(
            self._annotator, int(form["showing"]), cast("Choice", choice), comment
        )
        if stored:
            return RedirectResponse("/", 303)
        stands = self._queue.store.has_label(self._annotator, int(form["showing"]))
        return RedirectResponse(f"/?notice={'stored' if stands else 'waits'}", 303)

    async def undo(self, request: Request) -> Response:
        """Take back a label, then show its pair again."""
        form = await self._read_form(request)
        if isinstance(form, Response):
            return form
        if not _is_number(form.get("label", "")):
            return PlainTextResponse("No label was named to take back. Nothing was changed.", 400)
        undone = self._queue.store.undo(self._annotator, int(form["label"]))
        return RedirectResponse("/" if undone else "/?notice=undone", 303)

    async def _read_form(self, request: Request) -> Mapping[str, str] | Response:
        """The fields of a form of ours, or the answer to what is none."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _LONGEST_FORM:
                return PlainTextResponse("The comment is too long; shorten it. Nothing was stored.", 413)
        try:
            fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=10, errors="strict")
        except ValueError:  # bad UTF-8, too many fields
            return PlainTextResponse("This is no form of this page. Nothing was stored.", 400)
        form = {name: values[0] for name, values in fields.items()}
        # beside the cookie, which a browser sends by itself
        if not self._is_token(form.get("token")):
            return PlainTextResponse(
                "This form has no valid token; load the page again. Nothing was stored.", 403
            )
        return form


async def _explain(request: Request, error: Exception) -> Response:
    """A form that names what was never shown, or a store that cannot be written now."""
    return PlainTextResponse(str(error), 409)


def _progress(own: list[Label], remaining: int) -> dict[str, Any]:
    """What the page says of the annotator's own work."""
    seconds = median(label.seconds for label in own) if own else math.nan
    return {
        "done": len(own),
        "remaining": remaining,
        "seconds": None if math.isnan(seconds) else seconds,
    }


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19  # SQLite's integers have 64 bits


def _finalize(value: Any) -> Any:
    """Characters that reorder or hide text are shown by their escapes."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _file(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (_TEMPLATES / name).read_text(encoding="utf-8")

    async def send(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return send
