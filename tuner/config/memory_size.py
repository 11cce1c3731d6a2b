"""How much memory a run may take of a device, as text: "12GiB", "12GB" or "auto"."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

AUTO = "auto"
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(GiB|GB)")
_BYTES = {"GiB": 2**30, "GB": 10**9}


def gib(size: str) -> float | None:
    """A size in GiB; None for "auto"."""
    match = _SIZE.fullmatch(size)
    return None if match is None else float(match[1]) * _BYTES[match[2]] / 2**30


def _checked(value: Any) -> Any:
    if value is None or (isinstance(value, str) and (value == AUTO or gib(value))):
        return value
    raise ValueError(
        f'{value!r} is no size: write one such as "12GiB" (or "12GB", of 10^9 bytes each), "auto", or leave memory out'
    )


MemorySize = Annotated[str | None, BeforeValidator(_checked)]
"""A size, "auto", or None."""
