"""Functions named by a config: kept as "file.py:name", so that configs compare and go through JSON."""

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from tuner.errors import UserError


def is_function_reference(value: Any) -> bool:
    """Whether a value is a text "file.py:name"."""
    return isinstance(value, str) and re.fullmatch(r".+\.py:\w+", value) is not None


def name_function(value: Any) -> Any:
    """A function of the user's as "file.py:name"; raises ValueError for what cannot be named so."""
    if value is None or is_function_reference(value):
        return value
    if not callable(value):
        raise ValueError(f"{value!r} is not a function: write file.py:name")
    name = getattr(value, "__qualname__", "")
    if "<" in name or "." in name or not name:
        raise ValueError("a function in a config must stand at the top of a module: lambdas cannot be saved")
    return f"{_relative(inspect.getsourcefile(value) or '')}:{name}"


def _relative(file: str) -> str:
    path = Path(file).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


Function = Annotated[str | Callable[..., Any], BeforeValidator(name_function)]
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
