"""Base class of configs: frozen, strictly typed, documented, and helpful about misspelled fields."""

import json
import re
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from tuner.config.validation_errors import unknown_field

DEEPEST = 20
"""Levels of lists and dicts that a value may have; no field has more than a few."""
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
FOLDER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of names that become a folder's."""
LARGEST = 2**63 - 1
"""Largest integer of a field: seeds, numbers of rows and of tokens are 64-bit numbers where they are used."""


def _fits_a_file_system(path: str) -> str:
    names = path.split("/")
    if len(path.encode()) > 4095 or any(len(name.encode()) > 255 for name in names):
        raise ValueError(
            f"{path[:80]!r}... is longer than a file system allows (255 bytes a name, 4,095 a path); correct it"
        )
    return path


PathText = Annotated[str, AfterValidator(_fits_a_file_system)]
"""The path of a file or folder, or a name that may be one."""


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
            refuse_unwritable(name, fields[name])
        # strict mode takes a list for a tuple from JSON text only
        return {name: _lists_to_tuples(value) for name, value in fields.items()}

    def __hash__(self) -> int:
        values = self.model_dump(mode="json")  # a field may be a dict, which is not hashable
        return hash(json.dumps(values, sort_keys=True))

    def _repr_html_(self) -> str:
        """The config as a table, in Jupyter."""
        from tuner.config.config_table import to_html

        return to_html(self)


def refuse_unwritable(path: str, value: Any, depth: int = 0) -> None:
    """Raise ValueError for what no config can hold, since no JSON or UTF-8 file can, or since it never ends.

    These are numbers out of range, NUL and halves of characters (lone surrogates), and nesting beyond DEEPEST levels.
    """
    if depth > DEEPEST:
        raise ValueError(f"{path}: is nested more than {DEEPEST} levels deep; no field holds such a value")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(
            f"{path}: a number of {value.bit_length()} bits is out of range; they go up to {LARGEST}"
        )
    if isinstance(value, str) and _NO_TEXT.search(value):
        raise ValueError(
            f"{path}: {value[:80]!r} holds NUL or half of a character, which is no text; correct it"
        )
    if isinstance(value, dict):
        for key, item in cast("dict[Any, Any]", value).items():
            refuse_unwritable(path, key, depth + 1)
            refuse_unwritable(f"{path}.{key}", item, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(cast("list[Any] | tuple[Any, ...]", value)):
            refuse_unwritable(f"{path}.{index}", item, depth + 1)


def _lists_to_tuples(value: Any) -> Any:
    """A list as a tuple; in a dict, its values likewise."""
    if isinstance(value, list):
        return tuple(cast("list[Any]", value))
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in cast("dict[str, Any]", value).items()}
    return value
