"""The only place that makes texts of rich: a string given to rich could hold its markup, or command the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.printable import printable

if TYPE_CHECKING:
    from rich.text import Text


def rich_text(text: str = "", style: str = "") -> Text:
    """The text as nothing but text, whatever it contains."""
    from rich.text import Text

    return Text(printable(text), style=style)
