"""A config as a table: every leaf with its value, where that comes from, and what it means."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from pydantic import BaseModel

from tuner.config.base import ConfigBase
from tuner.config.serialization import Leaf, leaves

Origin = Literal["default", "config", "override"]


@dataclass(frozen=True)
class Row:
    """One leaf of a config."""

    path: str
    """Dotted, as overrides are written: `optimizer.lr`."""
    value: Any
    origin: Origin
    """Who chose it: nobody, the config file, or the command line."""
    meaning: str

    @property
    def text(self) -> str:
        """The value as it would be written in a config file."""
        return written(self.value)


def table(config: ConfigBase, overridden: Collection[str] = ()) -> list[Row]:
    """Every leaf of a config in the order of its fields.

    overridden: the paths set after loading, such as {"optimizer.lr"}; they may name whole parts.
    """
    chosen = dict(_defaults(config, ""))
    return [
        Row(leaf.path, leaf.value, _origin(leaf, chosen, overridden), leaf.meaning) for leaf in leaves(config)
    ]


def written(value: Any) -> str:
    """A value as Python: `Source(path='a.jsonl', share=2.0)` without the defaults, all else as its repr."""
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {written(item)}' for key, item in value.items())}}}"
    if isinstance(value, BaseModel):
        fields = ", ".join(f"{name}={written(item)}" for name, item in _not_default(value))
        return f"{type(value).__name__}({fields})"
    return repr(value)


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def to_html(config: ConfigBase, overridden: Collection[str] = ()) -> str:
    """The table as HTML for Jupyter; what was chosen stands out from the defaults."""
    rows = "".join(_html_row(row) for row in table(config, overridden))
    return (
        f"<b>{escape(type(config).__name__)}</b>"
        f"<table><thead><tr>{_html_cells(('field', 'value', 'from', 'meaning'), 'th')}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _origin(leaf: Leaf, defaults: dict[str, Any], overridden: Collection[str]) -> Origin:
    if any(_covers(path, leaf.path) or _covers(leaf.path, path) for path in overridden):
        return "override"
    default = defaults.get(leaf.path, leaf.default)
    same = leaf.value == default and isinstance(leaf.value, bool) == isinstance(default, bool)
    return "default" if same else "config"


def _covers(path: str, other: str) -> bool:
    """Whether `other` is at `path` or below it, as tracking.mode is below tracking."""
    return other == path or other.startswith(f"{path}.")


def _defaults(part: ConfigBase, prefix: str) -> Iterator[tuple[str, Any]]:
    """Defaults that differ from those of a part's own class.

    A stage may begin with a part unlike the part's defaults, and a part of another kind than its field's
    default was chosen, kind and all. What stands nearer to the stage comes later and so counts.
    """
    for name, field in type(part).model_fields.items():
        value, path = getattr(part, name), f"{prefix}{name}."
        if not isinstance(value, ConfigBase):
            continue
        yield from _defaults(value, path)
        if type(field.default) is type(value):
            yield from ((f"{path}{leaf.path}", leaf.value) for leaf in leaves(field.default))
        elif "kind" in type(value).model_fields:
            yield f"{path}kind", None


def _not_default(part: BaseModel) -> Iterator[tuple[str, Any]]:
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if field.is_required() or value != field.get_default(call_default_factory=True):
            yield name, value


def _html_row(row: Row) -> str:
    style = ' style="opacity:.55"' if row.origin == "default" else ""
    return f"<tr{style}>{_html_cells((row.path, row.text, row.origin, row.meaning), 'td')}</tr>"


def _html_cells(texts: tuple[str, ...], tag: str) -> str:
    return "".join(f'<{tag} style="text-align:left">{escape(text)}</{tag}>' for text in texts)
