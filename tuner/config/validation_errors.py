"""Pydantic's validation errors in sentences."""

from typing import Any

from pydantic import ValidationError

_TAGS = {"chat", "text", "cosine", "linear", "constant", "str", "Source", "model", "rule"}
"""Names that pydantic gives to the members of a union."""


def explain(error: ValidationError, inside: str = "") -> str:
    """Pydantic's findings as one sentence each: where (below `inside`), what was found, what to write."""
    by_path: dict[str, list[Any]] = {}
    for finding in error.errors():
        by_path.setdefault(_path(finding), []).append(finding)
    deepest = [path for path in by_path if not any(other.startswith(f"{path}.") for other in by_path if path)]
    return "; ".join(
        _explain_one(f"{inside}{path}" if path else "", _joined(by_path[path])) for path in deepest
    )


def _path(finding: Any) -> str:
    """Where a finding is, without the names that pydantic gives to the members of a union."""
    parts = [str(part) for part in finding["loc"]]
    return ".".join(part for part in parts if part not in _TAGS and "[" not in part)


def _joined(findings: list[Any]) -> Any:
    """One finding of those that the members of a union have on the same value: our own words, then their names."""
    own = next((finding for finding in findings if finding["type"] == "value_error"), None)
    if own is None:
        return findings[0]
    names = [finding["ctx"]["expected"] for finding in findings if finding["type"] == "literal_error"]
    return {**own, "msg": ", or ".join([own["msg"], *names])}


def _explain_one(path: str, finding: Any) -> str:
    message = finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "tuple_type":
        message = f"write a tuple, as in ({finding['input']!r},)"
    elif finding["type"] == "missing":
        message = "is required"
    elif finding["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, not {finding['input']!r}"
    return f"{path}: {message}" if path else message
