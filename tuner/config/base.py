"""What every config value has in common: frozen, strict, documented, and helpful when a name is wrong."""

import difflib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class ConfigBase(BaseModel):
    """A frozen value. Fields are documented by the string below each of them."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """Refuse unknown names with a suggestion, and take lists (as JSON has them) for tuples."""
        if not isinstance(values, dict):
            return values
        for name in values:
            if name not in cls.model_fields:
                close = difflib.get_close_matches(str(name), cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(cls.model_fields)}"
                raise ValueError(f"{cls.__name__} has no field {name!r}; {hint}")
        return {name: _tuples(value) for name, value in values.items()}

    def __hash__(self) -> int:
        plain = self.model_dump(mode="json")  # values may be dicts, which have no hash of their own
        return hash(json.dumps(plain, sort_keys=True))

    def _repr_html_(self) -> str:
        """The value as a table, in Jupyter."""
        from tuner.config.config_table import to_html

        return to_html(self)


def _tuples(value: Any) -> Any:
    """Lists as tuples, those of a dict's values too."""
    if isinstance(value, list):
        return tuple(value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
