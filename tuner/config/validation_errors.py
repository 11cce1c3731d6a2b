"""Pydantic's validation errors as one-sentence messages."""

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_UNION_TAGS = {
    "chat",
    "text",
    "cosine",
    "linear",
    "constant",
    "str",
    "int",
    "float",
    "Source",
    "Model",
    "Rule",
}
"""Names that pydantic gives to the members of a union."""


def explain(error: ValidationError, prefix: str = "") -> str:
    """One sentence per error: the field (`prefix` before its path), what is wrong, and what to write."""
    by_path: dict[str, list[ErrorDetails]] = {}
    for details in error.errors():
        by_path.setdefault(_path(details), []).append(details)
    # pydantic reports every member of a union; the longest path is in the one that the value came closest to
    deepest = [path for path in by_path if not any(other.startswith(f"{path}.") for other in by_path if path)]
    return "; ".join(_sentence(f"{prefix}{path}" if path else "", _merge(by_path[path])) for path in deepest)


def _path(details: ErrorDetails) -> str:
    """The dotted path of an error, without the names that pydantic gives to the members of a union."""
    names = [str(name) for name in details["loc"]]
    return ".".join(name for name in names if name not in _UNION_TAGS and "[" not in name)


def _merge(errors: list[ErrorDetails]) -> ErrorDetails:
    """One error for the members of a union that reject the same value: our validator's, with the literals allowed."""
    value_error = next((details for details in errors if details["type"] == "value_error"), None)
    if value_error is None:
        return errors[0]
    literals = [
        details.get("ctx", {})["expected"] for details in errors if details["type"] == "literal_error"
    ]
    return {**value_error, "msg": ", or ".join([value_error["msg"], *literals])}


def _sentence(path: str, details: ErrorDetails) -> str:
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "tuple_type":
        message = f"write a tuple, as in ({details['input']!r},)"
    elif details["type"] == "missing":
        message = "is required"
    elif details["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, not {details['input']!r}"
    return f"{path}: {message}" if path else message
