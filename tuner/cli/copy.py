"""`tuner copy`: one of the named configs as a file of one's own."""

import ast
from pathlib import Path
from typing import Annotated

import typer

from tuner.errors import UserError


def copy(
    name: Annotated[str, typer.Argument(help="A name from `tuner configs`.")],
    to: Annotated[str | None, typer.Argument(help="A file or folder; by default NAME.py here.")] = None,
) -> None:
    """Copy a config that comes with tuner, to change it."""
    source = _named(name)
    target = _target(source, to)
    others = {target.parent / file.name: file for file in _built_on(source)}
    for file, original in others.items():
        if file.exists() and file.read_bytes() != original.read_bytes():
            raise UserError(
                f"{name} builds on {original.name}, but there is another {file}: copy to an empty folder"
            )
    if target.exists():
        raise UserError(f"{target} exists already and is not overwritten: name another file, or remove it")
    for file, original in {**others, target: source}.items():
        _write(file, original.read_bytes())
        typer.echo(f"{file}")


def _named(name: str) -> Path:
    import difflib

    from tuner.resources import configs_folder

    known = {file.stem: file for file in configs_folder().glob("*.py")}
    stem = Path(name).stem if name.endswith(".py") else name
    if stem in known:
        return known[stem]
    close = difflib.get_close_matches(stem, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "`tuner configs` lists them"
    raise UserError(f"no config that comes with tuner is called {name!r}; {hint}")


def _target(source: Path, to: str | None) -> Path:
    if to is None:
        return Path(source.name)
    path = Path(to)
    if path.is_dir() or to.endswith("/"):
        return path / source.name
    return path if path.suffix == ".py" else path.with_name(f"{path.name}.py")


def _built_on(source: Path) -> list[Path]:
    """The configs beside it that a config imports, and those that they import: alone it would not load."""
    found: list[Path] = []
    waiting = [source]
    while waiting:
        for module in _imports(waiting.pop()):
            file = source.parent / f"{module}.py"
            if file.is_file() and file not in (source, *found):
                found.append(file)
                waiting.append(file)
    return found


def _imports(file: Path) -> list[str]:
    """Names of the modules that a file imports, read without running it."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]


def _write(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); choose another place") from error
