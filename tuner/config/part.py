"""What every config value has in common: frozen, strict, documented, and helpful when a name is wrong."""

import difflib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from tuner.errors import UserError


class Part(BaseModel):
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
        from tuner.config.show import to_html

        return to_html(self)


def _tuples(value: Any) -> Any:
    """Lists as tuples, those of a dict's values too."""
    if isinstance(value, list):
        return tuple(value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _name_function(value: Any) -> Any:
    if value is None or (isinstance(value, str) and re.fullmatch(r".+\.py:\w+", value)):
        return value
    if not callable(value):
        raise ValueError(f"{value!r} is no function: write file.py:name")
    name = getattr(value, "__qualname__", "")
    if "<" in name or "." in name or not name:
        raise ValueError("a function in a config must stand at the top of a module: lambdas cannot be saved")
    return f"{_relative(inspect.getsourcefile(value) or '')}:{name}"


def _relative(file: str) -> str:
    path = Path(file).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


Function = Annotated[str | Callable[..., Any], BeforeValidator(_name_function)]
"""A module-level function, kept as "file.py:name" so that configs compare and go through JSON."""


def load_function(reference: str, field: str, others: str = "") -> Callable[..., Any]:
    """The function that "file.py:name" names.

    field, others: the field that names it and what else could be written there, for the UserError that is
    raised when there is no such file, it fails, or it has no such function.
    """
    file, _, name = reference.rpartition(":")
    if not file or not Path(file).is_file():
        raise UserError(f"{field} {reference!r}: no such file; write {others}file.py:function")
    specification = importlib.util.spec_from_file_location(f"tuner_{Path(file).stem}", file)
    if specification is None or specification.loader is None:
        raise UserError(f"{field} {reference!r}: {file} is no Python file; write file.py:function")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up there
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file}: {type(error).__name__}: {error}; correct this file") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{file}: has no function {name!r}, which {field} names; correct the name")
    return function
