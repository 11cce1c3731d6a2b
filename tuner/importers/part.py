"""A config in the making: classes of tuner.config by name, their fields, and the comments above them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tuner import config as classes
from tuner.config.base import ConfigBase

_ALWAYS = {
    *("lr", "r", "alpha", "warmup", "epochs", "max_length", "template", "beta", "loss", "max_new_tokens"),
    *("tokens_per_step", "tokens_per_pass", "pairs_per_step", "answers_per_step", "prompts_per_step"),
}
"""Fields that are written even where they have the default: a reader looks for them."""


class Function(str):
    """The name of a function that the new config file defines itself."""

    __slots__ = ()


class Part:
    """A config object in the making: `Part("LoRA", r=64)` is written `LoRA(r=64)`.

    Fields that are None are left out, and those that are `...` are written None.
    """

    def __init__(self, name: str, /, **fields: Any) -> None:
        self.name = name
        self.fields: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
        self.comments: dict[str, str] = {}
        """Field -> what stands above it."""
        self.comment: str | None = None
        """What stands above the object itself, as an item of a tuple."""

    def __setitem__(self, field: str, value: Any) -> None:
        if value is not None:
            self.fields[field] = value

    def set(self, path: str, value: Any) -> None:
        """Set a field by its dotted path, through the objects on the way: `evaluation.every`."""
        owner, _, field = path.rpartition(".")
        part = self._part(owner)
        if part is not None:
            part[field] = value

    def explain(self, path: str, comment: str) -> None:
        """Put a comment above a field, by its dotted path; at the innermost object on the way that exists."""
        owner, _, field = path.rpartition(".")
        part = self._part(owner)
        if part is not None and field in part.fields:
            part.comments[field] = f"{part.comments[field]}; {comment}" if field in part.comments else comment
        elif owner:
            self.explain(owner, comment)

    def build(self, file: str) -> ConfigBase:
        """The config object, validated; the file is that of its functions. Raises pydantic's ValidationError."""
        return getattr(classes, self.name)(**{key: _built(value, file) for key, value in self.fields.items()})

    def without_defaults(self) -> Part:
        """The same object without fields that say what its class does anyway, unless a comment is about them."""
        fields = type_of(self).model_fields
        kept = Part(self.name)
        kept.comment, kept.comments = self.comment, self.comments
        for key, value in self.fields.items():
            value = _trimmed(value)
            default = fields[key].get_default(call_default_factory=True) if key in fields else None
            is_default = (
                type(value) in (type(default), int) and value == default and not isinstance(value, bool)
            )
            is_default = is_default or (isinstance(value, bool) and value is default)
            if key in self.comments or key in _ALWAYS or not (is_default or _is_empty(value)):
                kept.fields[key] = value
        return kept

    def class_names(self) -> Iterator[str]:
        """Names of its class and of those of its parts."""
        yield self.name
        for value in self.fields.values():
            yield from _class_names(value)

    def _part(self, path: str) -> Part | None:
        part: Any = self
        for name in path.split(".") if path else []:
            part = part.fields.get(name) if isinstance(part, Part) else None
        return part if isinstance(part, Part) else None


def type_of(part: Part) -> type[ConfigBase]:
    """The config class that a part becomes."""
    return getattr(classes, part.name)


def _built(value: Any, file: str) -> Any:
    if isinstance(value, Part):
        return value.build(file)
    if isinstance(value, tuple):
        return tuple(_built(item, file) for item in value)
    if value is ...:
        return None
    return f"{file}:{value}" if isinstance(value, Function) else value


def _trimmed(value: Any) -> Any:
    if isinstance(value, Part):
        return value.without_defaults()
    return tuple(_trimmed(item) for item in value) if isinstance(value, tuple) else value


def _is_empty(value: Any) -> bool:
    """Whether an object says nothing: Checkpoint() and Split(), whose class alone is the default of their fields."""
    return (
        isinstance(value, Part) and not value.fields and value.name in ("Checkpoint", "Split", "Validation")
    )


def _class_names(value: Any) -> Iterator[str]:
    if isinstance(value, Part):
        yield from value.class_names()
    elif isinstance(value, tuple):
        for item in value:
            yield from _class_names(item)
