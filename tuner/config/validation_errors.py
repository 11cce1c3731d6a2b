"""One-sentence messages for invalid configs: pydantic's errors, and fields that do not exist."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

LONGEST_VALUE = 200
"""Characters of a value that are quoted."""


def explain(error: ValidationError, config: Any, prefix: str = "", *, in_json: bool = False) -> str:
    """One sentence per error: the field (`prefix` before its path), what is wrong, and what to write.

    config: the class that was validated; Any where it is unknown. in_json: of a JSON file, where tuples are lists.
    """
    by_path: dict[str, list[ErrorDetails]] = {}
    for details in error.errors():
        by_path.setdefault(".".join(_path(details["loc"], config)), []).append(details)
    # pydantic reports every member of a union; the longest path is in the one that the value came closest to
    deepest = [path for path in by_path if not any(other.startswith(f"{path}.") for other in by_path if path)]
    return "; ".join(
        _sentence(f"{prefix}{path}" if path else "", _merge(by_path[path]), in_json) for path in deepest
    )


def unknown_field(config: type[BaseModel], name: object) -> str:
    """The message for a field that a config class does not have, with the one that was perhaps meant."""
    close = difflib.get_close_matches(str(name), config.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(config.model_fields)}"
    return f"{config.__name__} has no field {name!r}; {hint}"


def _path(location: Sequence[int | str], annotation: Any) -> Iterator[str]:
    """An error's path within a value of this type, without the names that pydantic gives to members of a union."""
    if not location:
        return
    name, *rest = location
    members = list(_members(annotation))
    if len(members) > 1:
        member = next((member for member in members if name in _names(member)), Any)
        yield from _path(rest, member)
    else:
        yield str(name)
        yield from _path(rest, _part(members[0], name))


def _members(annotation: Any) -> Iterator[Any]:
    """The types of which a value is one, None left out; a type that is no union alone."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            if member is not NoneType:
                yield from _members(member)
    else:
        yield annotation


def _names(member: Any) -> set[Any]:
    """Pydantic's names for a member of a union: its type, or the value of the literal by which members are told."""
    if not _is_model(member):
        return {str(member)}
    fields = member.model_fields.values()
    return {member.__name__, *(field.default for field in fields if get_origin(field.annotation) is Literal)}


def _part(annotation: Any, name: int | str) -> Any:
    """Type of a model's field, or of an item of a collection."""
    if _is_model(annotation):
        fields: Mapping[str, Any] = annotation.model_fields
        return fields[str(name)].annotation if name in fields else Any
    # the values of a mapping, or the items of a tuple (T, ...)
    items = [argument for argument in get_args(annotation) if argument is not ...]
    return items[-1] if items else Any


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _merge(errors: list[ErrorDetails]) -> ErrorDetails:
    """One error for the members of a union that reject the same value: our validator's, with the literals allowed."""
    value_error = next((details for details in errors if details["type"] == "value_error"), None)
    if value_error is None:
        return errors[0]
    literals = [
        details.get("ctx", {})["expected"] for details in errors if details["type"] == "literal_error"
    ]
    return {**value_error, "msg": ", or ".join([value_error["msg"], *literals])}


def _sentence(path: str, details: ErrorDetails, in_json: bool) -> str:
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "tuple_type" and in_json:
        message = f"write a list, as in [{_short(details['input'])}]"
    elif details["type"] == "tuple_type":
        message = f"write a tuple, as in ({_short(details['input'])},)"
    elif details["type"] == "missing":
        message = "is required"
    elif details["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, not {_short(details['input'])}"
    message = " ".join(message.split())  # pydantic quotes what it does not know as it is
    return f"{path}: {message}" if path else message


def _short(value: object) -> str:
    """A value as Python writes it, cut where it is long: the field is named, and one look must find what is wrong."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
