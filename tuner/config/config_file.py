"""Config files: a Python module with one value named `config`."""

import difflib
import runpy
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from tuner.config.base import ConfigBase
from tuner.config.stage_config import StageConfig
from tuner.config.validation_errors import explain
from tuner.errors import UserError
from tuner.resources import configs_folder


def load_config(path: str | Path) -> StageConfig:
    """The value named `config` in a Python file or in one of the configs shipped with tuner.

    Raises UserError when the file is missing, fails to run, or defines no config.
    """
    file = _resolve(Path(path))
    config = _run(file).get("config")
    if not isinstance(config, StageConfig):
        actual = "no such value" if config is None else f"an object of type {type(config).__name__}"
        raise UserError(
            f"{file}: a config file ends with `config = SFT(...)` or another stage; found {actual}"
        )
    return config if config.name else config.model_copy(update={"name": file.stem})


def _resolve(path: Path) -> Path:
    """The file of this path, or of a shipped config of this name."""
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(configs_folder().glob("*.py"))}
    if path.stem in shipped and path.parent in (Path("."), Path("configs")):
        return shipped[path.stem]
    close = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f"did you mean {close[0]}?" if close else "`tuner configs` lists the shipped ones"
    raise UserError(f"{path}: no such config file; {hint}")


def _run(file: Path) -> dict[str, Any]:
    """Execute a config file with its folder importable, so that one config can build on another."""
    folder = str(file.resolve().parent)
    modules_before = set(sys.modules)
    _check_text(file)
    sys.path.insert(0, folder)
    try:
        return runpy.run_path(str(file), run_name=f"tuner_config_{file.stem}")
    except ValidationError as error:
        explanation = explain(error, _class_named(error.title), f"{error.title}.")
        raise UserError(f"{_where(error, file)}: {explanation}") from error
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(
            f"{error.filename}:{error.lineno}: not valid Python ({error.msg}); correct it"
        ) from error
    # SystemExit too: a config that calls sys.exit() would end the CLI without a message
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{_where(error, file)}: {type(error).__name__}: {error}; correct this file"
        ) from error
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - modules_before:  # in Jupyter, an edited base config must be reread
            if _is_in_folder(sys.modules[name], folder):
                del sys.modules[name]


def _class_named(title: str, base: type[ConfigBase] = ConfigBase) -> Any:
    """The config class of this name, or Any: a validation error holds no more of what was validated."""
    for part in base.__subclasses__():
        named = part if part.__name__ == title else _class_named(title, part)
        if named is not Any:
            return named
    return Any


def _check_text(file: Path) -> None:
    """Reject unreadable, empty and binary files, for which Python's own messages speak of its parser."""
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{file}:{line}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    if not text.strip():
        raise UserError(f"{file}: the file is empty; a config file ends with `config = SFT(...)`")
    if "\0" in text:
        raise UserError(f"{file}: the file holds binary data, not Python; name a config file")


def _is_in_folder(module: ModuleType, folder: str) -> bool:
    return str(Path(getattr(module, "__file__", None) or "/").parent) == folder


def _where(error: BaseException, file: Path) -> str:
    """file:line in the config file where an error was raised; the file alone when no frame is in it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    return f"{file}:{lines[-1]}" if lines else str(file)
