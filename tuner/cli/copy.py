"""`tuner copy`: a shipped config as a file to edit."""

import ast
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.output import write_file
from tuner.errors import UserError
from tuner.printable import echo


def copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped config (see `tuner configs`).")],
    to: Annotated[str | None, typer.Argument(help="Destination file or folder; default: NAME.py.")] = None,
) -> None:
    """Copy a shipped config, to edit it."""
    source = _shipped_config(name)
    target = _target(source, to)
    imports = {target.parent / file.name: file for file in _imported_configs(source)}
    for file, original in imports.items():
        # An import is found by name: another file of that name would silently become the base of this config.
        if file.exists() and file.read_bytes() != original.read_bytes():
            raise UserError(
                f"{name} builds on {original.name}, but {file} is another file: copy to an empty folder"
            )
    if target.exists():
        raise UserError(f"{target} exists already and is not overwritten: name another file, or remove it")
    for file, original in {**imports, target: source}.items():
        _copy_file(original, file)
        echo(f"{file}")


def _shipped_config(name: str) -> Path:
    import difflib

    from tuner.resources import configs_folder

    shipped = {file.stem: file for file in configs_folder().glob("*.py")}
    stem = Path(name).stem if name.endswith(".py") else name
    if stem in shipped:
        return shipped[stem]
    close = difflib.get_close_matches(stem, shipped, n=1)
    hint = f"did you mean {close[0]}?" if close else "`tuner configs` lists them"
    raise UserError(f"{name}: no shipped config has this name; {hint}")


def _target(source: Path, to: str | None) -> Path:
    if to is None:
        return Path(source.name)
    path = Path(to)
    if path.is_dir() or to.endswith("/"):
        return path / source.name
    return path if path.suffix == ".py" else path.with_name(f"{path.name}.py")


def _imported_configs(source: Path) -> list[Path]:
    """The configs in the same folder that a config imports, directly or not: it cannot load without them."""
    imported: list[Path] = []
    unread = [source]
    while unread:
        for module in _imported_modules(unread.pop()):
            file = source.parent / f"{module}.py"
            if file.is_file() and file not in (source, *imported):
                imported.append(file)
                unread.append(file)
    return imported


def _imported_modules(file: Path) -> list[str]:
    """Names of the modules that a file imports, read without executing it."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]


def _copy_file(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); choose another place") from error
    write_file(target, source.read_bytes())
