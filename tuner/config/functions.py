"""Functions in configs, stored as "file.py:name" so that configs can be compared and serialized to JSON."""

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from tuner.config.base import PathText
from tuner.errors import UserError


def is_function_reference(value: Any) -> bool:
    """Whether a value is a string of the form "file.py:name"."""
    return isinstance(value, str) and re.fullmatch(r".+\.py:\w+", value) is not None


def function_reference(value: Any) -> Any:
    """A function as "file.py:name"; None and such strings unchanged. Raises ValueError for anything else."""
    if value is None or is_function_reference(value):
        return value
    if not callable(value):
        raise ValueError(f"{value!r} is not a function: write file.py:name")
    name = getattr(value, "__qualname__", "")
    if "<" in name or "." in name or not name:
        raise ValueError(
            "a function in a config must be defined at the top level of a module: lambdas cannot be saved"
        )
    return f"{_relative(inspect.getsourcefile(value) or '')}:{name}"


def _relative(file: str) -> str:
    """The path relative to the working directory where possible, so that a run folder can move with its project."""
    path = Path(file).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


Function = Annotated[PathText | Callable[..., Any], BeforeValidator(function_reference)]
"""A module-level function, stored as "file.py:name"."""


def load_function(reference: str, field: str, others: str = "") -> Callable[..., Any]:
    """Import the function that "file.py:name" refers to.

    Raises UserError when the file is missing, fails to run, or defines no such function. field: the config field that
    holds the reference, for the message; others: other values that the field takes, such as '"exact" or '.
    """
    file, _, name = reference.rpartition(":")
    if not file or not Path(file).is_file():
        raise UserError(f"{field} {reference!r}: no such file; write {others}file.py:function")
    specification = importlib.util.spec_from_file_location(f"tuner_{Path(file).stem}", file)
    if specification is None or specification.loader is None:
        raise UserError(f"{field} {reference!r}: {file} is not a Python file; write {others}file.py:function")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look up their module there
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file}: {type(error).__name__}: {error}; correct this file") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{file}: has no function {name!r}, which {field} names; correct the name")
    return function
