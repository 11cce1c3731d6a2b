"""The fields of a request's JSON body, checked as they are read; those that nobody reads are refused."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, cast

from tuner.data.turns import is_object

_HARMLESS = frozenset(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))
"""Fields that change no answer here."""
_NEUTRAL: dict[str, Any] = {"response_format": {"type": "text"}, "best_of": 1, "repetition_penalty": 1}
"""Values of fields that ask for nothing, besides null, zero, false and what is empty."""


class RequestError(Exception):
    """A request that is answered by an error in OpenAI's shape."""

    def __init__(
        self,
        message: str,
        field: str | None = None,
        *,
        status: int = HTTPStatus.BAD_REQUEST,
        code: str | None = None,
    ) -> None:
        """message: a sentence. field: the one at fault. code: OpenAI's word for the fault, where it has one."""
        super().__init__(message)
        self.status, self.field, self.code = status, field, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        is_ours = self.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        kind = "server_error" if is_ours else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.field,
                "code": self.code or self.status,
            }
        }


def as_refusal(error: Exception) -> RequestError:
    """A user's error as that of a request."""
    return error if isinstance(error, RequestError) else RequestError(" ".join(str(error).split()))


class RequestFields:
    """A body's fields, which remembers those that were read. All raise RequestError for values of another type."""

    def __init__(self, body: Any) -> None:
        if not is_object(body):
            raise RequestError("the body of a request is a JSON object")
        self._values: Mapping[str, Any] = body
        self._read: set[str] = set()

    def value(self, name: str) -> Any:
        """A field's value; None where it is absent or null."""
        self._read.add(name)
        return self._values.get(name)

    def number(self, name: str, least: float, most: float, default: float) -> float:
        value = self.value(name)
        if value is None:
            return default
        # in Python True is an int
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise RequestError(f"{name} is a number from {least:g} to {most:g}, not {value!r:.60}", name)
        return float(value)

    def whole(self, name: str, least: int, most: int, default: int | None) -> int | None:
        value = self.value(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise RequestError(f"{name} is a whole number from {least} to {most}, not {value!r:.60}", name)
        return value

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if value not in (None, True, False):
            raise RequestError(f"{name} is true or false, not {value!r:.60}", name)
        return bool(value)

    def text(self, name: str) -> str | None:
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{name} is a text, not {value!r:.60}", name)
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text, or a list of some."""
        value = self.value(name)
        values = [value] if isinstance(value, str) else [] if value is None else value
        is_list = isinstance(values, list)
        if not is_list or len(values) > most or not all(isinstance(item, str) and item for item in values):
            raise RequestError(f"{name} is a text that is not empty, or a list of at most {most}", name)
        return tuple(cast("list[str]", values))

    def refuse_unread(self) -> None:
        """Raise RequestError where the body asks for what nobody read: ignored, it would be answered wrongly."""
        for name, value in self._values.items():
            if name in self._read or name in _HARMLESS or not value or value == _NEUTRAL.get(name):
                continue
            raise RequestError(f"{name}={value!r:.60} is not supported by this server; leave it out", name)
