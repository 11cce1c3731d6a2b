"""The rules of the small run in rounds."""

from typing import Any


def shorter(answer: str, row: dict[str, Any]) -> float:
    """What its labels go by."""
    return -len(answer)


def is_sum(answer: str, row: dict[str, Any]) -> float:
    """Its gold score."""
    return float("=" in answer)
