"""Python configs read as syntax: literals, names and arithmetic of literals. Nothing of a file is run or imported."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from tuner.errors import UserError
from tuner.importers.keys import Block, Unread
from tuner.importers.python_values import MOST_ITEMS, Expressions, Symbol

LARGEST_FILE = 1_000_000
"""Bytes of a config; they have a few thousand."""
_DEEPEST_BASE = 10
"""Base configs on top of each other."""


def read_text(path: Path) -> str:
    """The text of a config. Raises UserError for what is unreadable, too large or no text."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path}: {len(content):,} bytes are too many for a config; name a config file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    if "\0" in text or not text.strip():
        raise UserError(
            f"{path}: {'binary data' if text.strip() else 'an empty file'}, no config; name a config file"
        )
    return text


def read_python(path: Path) -> tuple[Block, list[str]]:
    """The values of a config's names, and those names that nothing in the file reads.

    A base config (`with read_base()`, `_base_`) is read from beside the file. What would have to be run is an Unread.
    Raises UserError with `file:line` for what is no Python.
    """
    module = _Module(path, ())
    return module.names, [name for name in module.names if name not in module.used]


class _Module(Expressions):
    def __init__(self, path: Path, above: tuple[Path, ...]) -> None:
        super().__init__()
        self.path = path
        self._above = (*above, path.resolve())
        text = read_text(path)
        try:
            self._run(ast.parse(text).body)
        except SyntaxError as error:
            raise UserError(f"{path}:{error.lineno}: not valid Python ({error.msg}); correct it") from error
        except ValueError as error:
            raise UserError(f"{path}: not valid Python ({error}); correct it") from error
        except (RecursionError, MemoryError):
            raise UserError(f"{path}: is nested too deeply to be read; name a config file") from None
        if "_base_" in self.names:
            self._inherit()

    def _run(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            match statement:
                case ast.Assign():
                    value = self.value(statement.value)
                    for target in statement.targets:
                        self._assign(target, value)
                case ast.AnnAssign(value=ast.expr() as expression):
                    self._assign(statement.target, self.value(expression))
                case ast.AugAssign(target=ast.Name(id=name)):
                    operation = ast.BinOp(ast.Name(name, ast.Load()), statement.op, statement.value)
                    read = name in self.used  # `x *= 2` alone does not use x
                    self._assign(statement.target, self.value(ast.copy_location(operation, statement)))
                    self.used -= set() if read else {name}
                case ast.If():
                    self._branch(statement)
                case ast.With() if "read_base" in ast.unparse(statement.items[0]):
                    for imported in statement.body:
                        self._import_base(imported)
                case ast.Import() | ast.ImportFrom():
                    for alias in statement.names:
                        self.names.pop(alias.asname or alias.name, None)
                        if alias.asname:
                            self.aliases[alias.asname] = alias.name
                case ast.Expr(value=ast.Call() as call):
                    self._change(call)
                case ast.FunctionDef() | ast.ClassDef():
                    self._set(
                        statement.name,
                        Unread(f"{statement.name} is defined here", statement.lineno),
                        statement,
                    )
                case ast.Expr(value=ast.Constant()) | ast.Pass():
                    pass
                case _:
                    for node in ast.walk(statement):  # what a loop or `try` sets is known to nobody
                        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                            self._set(node.id, Unread(ast.unparse(statement), statement.lineno), node)

    def _branch(self, statement: ast.If) -> None:
        test = self.value(statement.test)
        if isinstance(test, Unread | Symbol):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    self._set(node.id, Unread(ast.unparse(statement.test), statement.lineno), node)
        else:
            self._run(statement.body if test else statement.orelse)

    def _set(self, name: str, value: Any, node: ast.AST) -> None:
        self.names[name] = value
        self.names.lines[name] = getattr(node, "lineno", 0)

    def _assign(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                self._set(name, value, target)
            case (
                ast.Attribute(value=owner, attr=key)
                | ast.Subscript(value=owner, slice=ast.Constant(value=str() as key))
            ):
                block = self.value(owner)
                if isinstance(block, Block):
                    block[key] = value
                    block.lines[key] = target.lineno
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                values = value if isinstance(value, list | tuple) and len(value) == len(targets) else None
                for index, part in enumerate(targets):
                    unread = Unread(ast.unparse(target), target.lineno)
                    self._assign(part, unread if values is None else values[index])
            case _:
                pass

    def _change(self, call: ast.Call) -> None:
        """`model.update(...)`, `model.merge(...)`, `hooks.append(...)`, `hooks.extend(...)`."""
        if not isinstance(call.func, ast.Attribute):
            return
        owner = self.value(call.func.value)
        values = [self.value(argument) for argument in call.args]
        if isinstance(owner, Block) and call.func.attr in ("update", "merge"):
            named = self.block([(keyword.arg, keyword.value) for keyword in call.keywords], call.lineno)
            for block in [*(value for value in values if isinstance(value, Block)), named]:
                owner.merge(block)
        elif isinstance(owner, list) and len(values) == 1 and len(owner) < MOST_ITEMS:
            if call.func.attr == "append":
                owner.append(values[0])
            elif call.func.attr == "extend" and isinstance(values[0], list | tuple):
                owner.extend(values[0][:MOST_ITEMS])

    def _import_base(self, statement: ast.stmt) -> None:
        """`from .._base_.models.x import *` within `with read_base():`."""
        if not isinstance(statement, ast.ImportFrom) or not statement.module:
            return
        folder = self.path.resolve().parent
        for _ in range(statement.level - 1):
            folder = folder.parent
        base = self._base(folder.joinpath(*statement.module.split(".")).with_suffix(".py"), statement.lineno)
        wanted = {alias.name: alias.asname or alias.name for alias in statement.names}
        for name, value in base.names.items():
            if "*" in wanted or name in wanted:
                self._set(wanted.get(name, name), value, statement)
        self.used |= base.used

    def _base(self, path: Path, line: int) -> _Module:
        if not path.is_file():
            raise UserError(
                f"{self.path}:{line}: {path}, which this config builds on, is not there; copy it, too"
            )
        if path.resolve() in self._above or len(self._above) > _DEEPEST_BASE:
            raise UserError(
                f"{self.path}:{line}: {path}: configs build on each other in a circle; correct it"
            )
        return _Module(path, self._above)

    def _inherit(self) -> None:
        """mmengine's `_base_ = [...]`: the values of base files, under those of this one, dict by dict."""
        names, line = self.names.pop("_base_"), self.names.lines.get("_base_", 0)
        merged = Block()
        for name in [names] if isinstance(names, str) else names if isinstance(names, list) else []:
            if isinstance(name, str):
                base = self._base(self.path.parent / name, line)
                merged.merge(base.names)
                self.used |= base.used
        self.names = _over(merged, self.names)


def _over(base: Block, own: Block) -> Block:
    """A block over another, dict by dict, as mmengine merges a config into its base."""
    merged = Block(base, base.lines)
    for key, value in own.items():
        below = base.get(key)
        nested = isinstance(value, Block) and isinstance(below, Block) and not value.get("_delete_")
        merged[key] = _over(below, value) if nested else value  # type: ignore[arg-type]
        merged.lines[key] = own.lines.get(key, 0)
    return merged
