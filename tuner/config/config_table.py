"""A config as a table: the value, origin and meaning of every field."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import BaseModel

from tuner.config.base import ConfigBase
from tuner.config.serialization import Leaf, leaves
from tuner.printable import safe

Origin = Literal["default", "config", "override"]


@dataclass(frozen=True)
class Row:
    """One leaf of a config."""

    path: str
    """Dotted, as in overrides: `optimizer.lr`."""
    value: Any
    origin: Origin
    """Where the value comes from: the class's default, the config file, or an override."""
    meaning: str

    @property
    def text(self) -> str:
        """The value as Python source, as in a config file."""
        return python_source(self.value)


def table(config: ConfigBase, overridden: Collection[str] = ()) -> list[Row]:
    """Every leaf of a config, in the order of its fields.

    overridden: the paths set after loading, such as {"optimizer.lr"}; a path may also cover several leaves.
    """
    defaults = dict(_stage_defaults(config, ""))
    return [
        Row(leaf.path, leaf.value, _origin(leaf, defaults, overridden), leaf.meaning)
        for leaf in leaves(config)
    ]


def python_source(value: Any) -> str:
    """A value as Python source; of a config class only what differs from its defaults: `Source(path='a.jsonl')`."""
    if isinstance(value, tuple):
        items = [python_source(item) for item in cast("tuple[Any, ...]", value)]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if isinstance(value, dict):
        entries = cast("dict[str, Any]", value).items()
        return f"{{{', '.join(f'{key!r}: {python_source(item)}' for key, item in entries)}}}"
    if isinstance(value, BaseModel):
        fields = ", ".join(f"{name}={python_source(item)}" for name, item in _non_default_fields(value))
        return f"{type(value).__name__}({fields})"
    return repr(value)


def to_html(config: ConfigBase, overridden: Collection[str] = ()) -> str:
    """The table as HTML for Jupyter; defaults are grayed out."""
    rows = "".join(_html_row(row) for row in table(config, overridden))
    return (
        f"<b>{safe(type(config).__name__)}</b>"
        f"<table><thead><tr>{_html_cells(('field', 'value', 'from', 'meaning'), 'th')}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _origin(leaf: Leaf, defaults: dict[str, Any], overridden: Collection[str]) -> Origin:
    if any(_covers(path, leaf.path) or _covers(leaf.path, path) for path in overridden):
        return "override"
    default = defaults.get(leaf.path, leaf.default)
    # in Python True == 1, in a config they differ
    is_default = leaf.value == default and isinstance(leaf.value, bool) == isinstance(default, bool)
    return "default" if is_default else "config"


def _covers(path: str, other: str) -> bool:
    """Whether `other` is `path` or below it, as tracking.mode is below tracking."""
    return other == path or other.startswith(f"{path}.")


def _stage_defaults(config: ConfigBase, prefix: str) -> Iterator[tuple[str, Any]]:
    """(path, default) of leaves whose default is set by an enclosing config, such as AdamW(lr=1e-6) by a stage.

    A config of another class than its field's default was chosen by the user, so its `kind` has no default. Outer
    configs are yielded last: in a dict they override inner ones.
    """
    for name, field in type(config).model_fields.items():
        value, path = getattr(config, name), f"{prefix}{name}."
        if not isinstance(value, ConfigBase):
            continue
        yield from _stage_defaults(value, path)
        if type(field.default) is type(value):
            yield from ((f"{path}{leaf.path}", leaf.value) for leaf in leaves(field.default))
        elif "kind" in type(value).model_fields:
            yield f"{path}kind", None


def _non_default_fields(model: BaseModel) -> Iterator[tuple[str, Any]]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if field.is_required() or value != field.get_default(call_default_factory=True):
            yield name, value


def _html_row(row: Row) -> str:
    style = ' style="opacity:.55"' if row.origin == "default" else ""
    return f"<tr{style}>{_html_cells((row.path, row.text, row.origin, row.meaning), 'td')}</tr>"


def _html_cells(texts: tuple[str, ...], tag: str) -> str:
    return "".join(f'<{tag} style="text-align:left">{safe(text)}</{tag}>' for text in texts)
