"""Config files to values and back: load, override, JSON both ways, comparison."""

import ast
import difflib
import json
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tuner.config.part import Part
from tuner.config.stage import Stage
from tuner.config.stages import STAGES
from tuner.errors import UserError
from tuner.resources import configs_folder

C = TypeVar("C", bound=Stage)


def load_config(path: str | Path) -> Stage:
    """The value named `config` of a Python file, or of a named config that comes with tuner.

    Raises UserError when the file is missing, fails, or holds no config.
    """
    file = _find(Path(path))
    config = _run(file).get("config")
    if not isinstance(config, Stage):
        found = "no such value" if config is None else f"a {type(config).__name__}"
        raise UserError(
            f"{file}: a config file ends with `config = SFT(...)` or another stage; found {found}"
        )
    return config if config.name else config.model_copy(update={"name": file.stem})


def override(config: C, changes: Mapping[str, Any] | list[str] | tuple[str, ...]) -> C:
    """A copy of `config` with some leaves changed, checked as a whole again.

    changes: {"optimizer.lr": 1e-4}, or what the command line takes: ["optimizer.lr=1e-4"].
    """
    pairs = changes if isinstance(changes, Mapping) else dict(_parse_assignment(text) for text in changes)
    values = config.model_dump(mode="json")
    for path, value in pairs.items():
        _check_first_name(config, path)
        _assign(values, path, value)
    return _validated(type(config), values, "override")


def to_json(config: Stage) -> str:
    """The whole config, every leaf written out, as indented JSON."""
    return config.model_dump_json(indent=2)


def from_json(text: str) -> Stage:
    """The config that `to_json` wrote; UserError when it is none, or of another version."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"this config is no JSON ({error}); restore it") from error
    if not isinstance(values, dict) or values.get("stage") not in STAGES:
        raise UserError(f'this JSON is no config: its "stage" must be one of {", ".join(STAGES)}')
    return _validated(STAGES[values["stage"]], values, "config.json")


@dataclass(frozen=True)
class Leaf:
    """One value of a config: its dotted path, itself, its default, and what it means."""

    path: str
    value: Any
    default: Any
    meaning: str


def leaves(config: Part) -> Iterator[Leaf]:
    """Every leaf of a config in the order of its fields."""
    yield from _leaves(config, "")


def differences(old: Stage, new: Stage) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of every leaf in which two configs differ; absent ones as None."""
    before = dict(_flatten(old.model_dump(mode="json"), ""))
    after = dict(_flatten(new.model_dump(mode="json"), ""))
    paths = list(dict.fromkeys([*before, *after]))
    return [
        (path, before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)
    ]


def explain(error: ValidationError, inside: str = "") -> str:
    """Pydantic's findings as one sentence each: where (below `inside`), what was found, what to write."""
    by_path: dict[str, list[Any]] = {}
    for finding in error.errors():
        by_path.setdefault(_path(finding), []).append(finding)
    deepest = [path for path in by_path if not any(other.startswith(f"{path}.") for other in by_path if path)]
    return "; ".join(
        _explain_one(f"{inside}{path}" if path else "", _joined(by_path[path])) for path in deepest
    )


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    named = {file.stem: file for file in sorted(configs_folder().glob("*.py"))}
    if path.stem in named and path.parent in (Path("."), Path("configs")):
        return named[path.stem]
    close = difflib.get_close_matches(path.stem, named, n=1)
    hint = f"did you mean {close[0]}?" if close else "`tuner configs` lists those that come with tuner"
    raise UserError(f"{path}: no such config file; {hint}")


def _run(file: Path) -> dict[str, Any]:
    """Execute a config file with its folder importable, so that one config can build on another."""
    folder = str(file.resolve().parent)
    known = set(sys.modules)
    _check_text(file)
    sys.path.insert(0, folder)
    try:
        return runpy.run_path(str(file), run_name=f"tuner_config_{file.stem}")
    except ValidationError as error:
        raise UserError(f"{_where(error, file)}: {explain(error, f'{error.title}.')}") from error
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(
            f"{error.filename}:{error.lineno}: not valid Python ({error.msg}); correct it"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{_where(error, file)}: {type(error).__name__}: {error}; correct this file"
        ) from error
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - known:  # a config edited in between must be read again (Jupyter)
            if _lies_in(sys.modules[name], folder):
                del sys.modules[name]


def _check_text(file: Path) -> None:
    """Said here: Python's own words for these are about its parser."""
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{file}:{line}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    if not text.strip():
        raise UserError(f"{file}: this file is empty; a config file ends with `config = SFT(...)`")
    if "\0" in text:
        raise UserError(f"{file}: this is binary data, not Python; name a config file")


def _lies_in(module: Any, folder: str) -> bool:
    return str(Path(getattr(module, "__file__", None) or "/").parent) == folder


def _where(error: BaseException, file: Path) -> str:
    """file:line of the config's own frame in which an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    return f"{file}:{lines[-1]}" if lines else str(file)


def _parse_assignment(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"override {text!r}: write key=value, as in optimizer.lr=1e-4")
    return path, _parse_value(value)


def _parse_value(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _assign(values: Any, path: str, value: Any) -> None:
    """Set the leaf at a dotted path of the plain values of a config; names are checked by the validation."""
    *parents, last = path.split(".")
    walked: list[str] = []
    for name in parents:
        walked.append(name)
        values = _child(values, name)
        if not isinstance(values, dict | list):
            raise UserError(
                f"override {path}: {'.'.join(walked)} is {values!r}, which has no {last!r}; set it whole"
            )
    if isinstance(values, list):
        _child(values, last)  # an index must exist
        values[int(last)] = _plain(value)
    else:
        values[last] = _plain(value)


def _check_first_name(config: Stage, path: str) -> None:
    """Say where a field stands that is named without its part, as in lr=1e-4."""
    first = path.partition(".")[0]
    if first not in type(config).model_fields:
        inside = [leaf.path for leaf in leaves(config) if f".{leaf.path}".endswith(f".{path}")]
        if inside:
            raise UserError(
                f"override: {type(config).__name__} has no field {path!r}; did you mean {inside[0]!r}?"
            )


def _child(values: Any, name: str) -> Any:
    try:
        return values[int(name)] if isinstance(values, list) else values[name]
    except (KeyError, IndexError, ValueError):
        known = values if isinstance(values, dict) else [str(index) for index in range(len(values))]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        raise UserError(f"override: no {name!r} here; {hint}") from None


def _plain(value: Any) -> Any:
    """A value as JSON has it; parts may stand in a tuple, as sources do in data.files."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _validated(cls: type[C], values: dict[str, Any], where: str) -> C:
    try:
        return cls.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error)}") from error


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


_TAGS = {"chat", "text", "cosine", "linear", "constant", "str", "Source"}


def _leaves(part: Part, prefix: str) -> Iterator[Leaf]:
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if isinstance(value, Part):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            yield Leaf(f"{prefix}{name}", value, default, " ".join((field.description or "").split()))


def _flatten(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _flatten(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, values
