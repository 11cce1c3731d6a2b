"""Configs as JSON and as flat lists of leaves, and the differences between two configs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

from tuner.config.base import ConfigBase, refuse_unwritable
from tuner.config.registry import config_class, stage_names
from tuner.config.stage_config import StageConfig
from tuner.config.validation_errors import explain
from tuner.errors import UserError

C = TypeVar("C", bound=StageConfig)


def to_json(config: StageConfig) -> str:
    """The whole config as indented JSON, defaults included."""
    return config.model_dump_json(indent=2)


def from_json(text: str) -> StageConfig:
    """The config that `to_json` wrote. Raises UserError when the text is no valid config of this version."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"this config is not valid JSON ({error}); restore it") from error
    fields = cast("dict[str, Any]", values) if isinstance(values, dict) else {}
    if fields.get("stage") not in stage_names():
        raise UserError(f'this JSON is no config: its "stage" must be one of {", ".join(stage_names())}')
    return validated(config_class(fields["stage"]), fields, "config.json")


@dataclass(frozen=True)
class Leaf:
    """A single value of a config: its dotted path, value, default and meaning."""

    path: str
    value: Any
    default: Any
    meaning: str


def leaves(config: ConfigBase) -> Iterator[Leaf]:
    """Every leaf of a config, in the order of its fields."""
    yield from _leaves(config, "")


def field_paths(cls: type[ConfigBase], prefix: str = "") -> Iterator[str]:
    """The dotted path of every field that a config of this class may have, parts of a union included."""
    for name, field in cls.model_fields.items():
        yield f"{prefix}{name}"
        for part in _config_classes(field.annotation):
            yield from field_paths(part, f"{prefix}{name}.")


def _config_classes(annotation: Any) -> Iterator[type[ConfigBase]]:
    """The config classes among the types that a value may have, by itself and not within a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, ConfigBase):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType):
        for argument in get_args(annotation):
            yield from _config_classes(argument)


def differences(old: StageConfig, new: StageConfig) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of every leaf in which two configs differ; None where it is absent.

    Paths are those of overrides, such as rounds.1.steps for the second item of a list. What one config alone has, such
    as a further item, is one leaf.
    """
    return list(_differences(old.model_dump(mode="json"), new.model_dump(mode="json"), ""))


def validated(cls: type[C], values: dict[str, Any], where: str) -> C:
    """Validate plain values as a config. Raises UserError, its message starting with `where`, if they are invalid."""
    try:
        for name, value in values.items():
            refuse_unwritable(name, value)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    try:
        # as JSON text: in strict mode pydantic accepts a list for a tuple there, but not in Python values
        return cls.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, cls)}") from error


def json_value(value: Any) -> Any:
    """A value of a config in JSON's types: tuples as lists, configs as dicts."""
    if isinstance(value, tuple | list):
        return [json_value(item) for item in cast("tuple[Any, ...] | list[Any]", value)]
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _leaves(config: ConfigBase, prefix: str) -> Iterator[Leaf]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, ConfigBase):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            yield Leaf(f"{prefix}{name}", value, default, " ".join((field.description or "").split()))


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    before, after = _children(old), _children(new)
    if type(old) is type(new) and before is not None and after is not None:
        for name in dict.fromkeys([*before, *after]):
            inner = f"{path}.{name}" if path else name
            yield from _differences(before.get(name), after.get(name), inner)
    elif old != new:
        yield path, old, new


def _children(value: Any) -> dict[str, Any] | None:
    """The values within one, by their names in paths; None for one that has none."""
    if isinstance(value, list):
        return {str(index): item for index, item in enumerate(cast("list[Any]", value))}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
