"""Base class of configs: frozen, strictly typed, documented, and helpful about misspelled fields."""

import json
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, model_validator

from tuner.config.validation_errors import unknown_field

LARGEST = 2**63 - 1
"""Largest integer of a field: seeds, numbers of rows and of tokens are 64-bit numbers where they are used."""


class ConfigBase(BaseModel):
    """A frozen value. The string below a field documents it, here and in `tuner show`."""

    # strict: else pydantic would read "3" as 3 and True as 1.0 without a word
    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """Reject unknown fields with a suggestion, and accept lists, as JSON has them, for tuples."""
        if not isinstance(values, dict):
            return values
        fields = cast("dict[str, Any]", values)
        for name in fields:
            if name not in cls.model_fields:
                raise ValueError(unknown_field(cls, name))
            if isinstance(fields[name], int) and abs(fields[name]) > LARGEST:
                raise ValueError(f"{name}: {fields[name]} is out of range; numbers go up to {LARGEST}")
        # strict mode takes a list for a tuple from JSON text only
        return {name: _lists_to_tuples(value) for name, value in fields.items()}

    def __hash__(self) -> int:
        values = self.model_dump(mode="json")  # a field may be a dict, which is not hashable
        return hash(json.dumps(values, sort_keys=True))

    def _repr_html_(self) -> str:
        """The config as a table, in Jupyter."""
        from tuner.config.config_table import to_html

        return to_html(self)


def _lists_to_tuples(value: Any) -> Any:
    """A list as a tuple; in a dict, its values likewise."""
    if isinstance(value, list):
        return tuple(cast("list[Any]", value))
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in cast("dict[str, Any]", value).items()}
    return value
