"""Values of Python expressions: literals, names, and arithmetic of literals. Nothing is run."""

from __future__ import annotations

import ast
import operator
import posixpath
from collections.abc import Callable
from typing import Any

from tuner.importers.keys import Block, Unread, is_text

MOST_ITEMS = 10_000
"""Items of a list, and characters of a text, that are put together from others."""
_LARGEST = 1_000_000
"""Items or characters of a literal."""
_NUMBERS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class Symbol(str):
    """The dotted name of something that is imported: `PROMPT_TEMPLATE.internlm2_chat`."""

    __slots__ = ()


class Expressions:
    """Evaluates expressions over the names of a module."""

    def __init__(self) -> None:
        self.names = Block()
        self.used: set[str] = set()
        """Names that an expression has read."""
        self.aliases: dict[str, str] = {}
        """Name in the file -> name of what is imported under it."""

    def value(self, node: ast.expr) -> Any:
        """The value of an expression; an Unread where it is more than literals, names and their arithmetic."""
        try:
            value = self._evaluate(node)
        except (ArithmeticError, TypeError, ValueError, LookupError):
            value = None
            return Unread(ast.unparse(node), node.lineno)
        too_large = (isinstance(value, int) and abs(value) >= 2**63) or (
            isinstance(value, str | list | tuple) and len(value) > _LARGEST
        )
        return Unread(ast.unparse(node)[:200], node.lineno) if too_large else value

    def _evaluate(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                known = value is None or isinstance(value, bool | int | float)
                return value if known or (isinstance(value, str) and is_text(value)) else self._unread(node)
            case ast.Name(id=name):
                self.used.add(name)
                return self.names[name] if name in self.names else Symbol(self.aliases.get(name, name))
            case ast.Attribute(value=owner, attr=key):
                return self._member(self.value(owner), key, node)
            case ast.Subscript(value=owner, slice=key):
                return self._member(self.value(owner), self.value(key), node)
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.Dict(keys=keys, values=values):
                pairs = [
                    (None if key is None else self.value(key), value)
                    for key, value in zip(keys, values, strict=True)
                ]
                return self.block(pairs, node.lineno)
            case ast.Call():
                return self._call(node)
            case ast.JoinedStr(values=pieces):
                return self._joined(pieces, node)
            case _:
                return self._operation(node)

    def _operation(self, node: ast.expr) -> Any:
        """The value of arithmetic, of a comparison, or of a choice."""
        match node:
            case ast.BinOp(left=left, op=operation, right=right):
                return self._binary(self.value(left), operation, self.value(right), node)
            case ast.UnaryOp(op=ast.USub(), operand=operand) if _is_number(value := self.value(operand)):
                return -value
            case ast.UnaryOp(op=ast.Not(), operand=operand) if not isinstance(
                value := self.value(operand), Unread
            ):
                return not value
            case ast.IfExp(test=test, body=body, orelse=orelse):
                chosen = self.value(test)
                return (
                    self._unread(node)
                    if isinstance(chosen, Unread | Symbol)
                    else self.value(body if chosen else orelse)
                )
            case ast.BoolOp(op=operation, values=operands):
                values = [self.value(operand) for operand in operands]
                if any(isinstance(value, Unread | Symbol) for value in values):
                    return self._unread(node)
                return all(values) if isinstance(operation, ast.And) else any(values)
            case ast.Compare(left=left, ops=[operation], comparators=[right]) if (
                type(operation) in _COMPARISONS
            ):
                sides = self.value(left), self.value(right)
                if any(isinstance(side, Unread | Block) for side in sides):
                    return self._unread(node)
                return bool(_COMPARISONS[type(operation)](*sides))
            case _:
                return self._unread(node)

    def _unread(self, node: ast.expr) -> Unread:
        return Unread(ast.unparse(node), node.lineno)

    def _member(self, owner: Any, key: Any, node: ast.expr) -> Any:
        if isinstance(owner, Symbol) and isinstance(key, str):
            return Symbol(f"{owner}.{key}")
        if isinstance(owner, Block) and isinstance(key, str):
            return owner[key]
        if isinstance(owner, list | tuple) and isinstance(key, int):
            return owner[key]
        return self._unread(node)

    def block(self, pairs: list[tuple[Any, ast.expr]], line: int) -> Block:
        """A dict: its keys with their lines; `**other` is merged."""
        block = Block()
        for key, value in pairs:
            item = self.value(value)
            if isinstance(key, str):
                block[key] = item
                block.lines[key] = value.lineno
            elif isinstance(item, Block):
                block.merge(item, line)
        return block

    def _call(self, node: ast.Call) -> Any:
        """`dict(...)`, `int(...)`, a join of paths, or `Class(key=value)`, which is `dict(type=Class, key=value)`."""
        function = self.value(node.func)
        arguments = [self.value(argument) for argument in node.args]
        if function in ("int", "float") and len(arguments) == 1 and _is_number(arguments[0]):
            return int(arguments[0]) if function == "int" else float(arguments[0])
        if isinstance(function, Symbol) and function.endswith("path.join"):
            texts = [
                argument
                for argument in arguments
                if isinstance(argument, str) and not isinstance(argument, Symbol)
            ]
            return posixpath.join(*texts) if len(texts) == len(arguments) else self._unread(node)
        if not isinstance(function, Symbol) or arguments or (function != "dict" and not node.keywords):
            return self._unread(node)
        block = self.block([(keyword.arg, keyword.value) for keyword in node.keywords], node.lineno)
        if function != "dict":
            block.setdefault("type", function)
        return block

    def _binary(self, left: Any, operation: ast.operator, right: Any, node: ast.expr) -> Any:
        if _is_number(left) and _is_number(right) and type(operation) in _NUMBERS:
            if isinstance(operation, ast.Pow) and (abs(right) > 64 or abs(left) > 1e6):
                return self._unread(node)
            return _NUMBERS[type(operation)](left, right)
        if isinstance(operation, ast.Add) and _is_joinable(left, right):
            return left + right if len(left) + len(right) <= MOST_ITEMS else self._unread(node)
        return self._unread(node)

    def _joined(self, pieces: list[ast.expr], node: ast.expr) -> Any:
        texts: list[str] = []
        for piece in pieces:
            value = self.value(piece.value) if isinstance(piece, ast.FormattedValue) else self.value(piece)
            formatted = isinstance(piece, ast.FormattedValue) and (
                piece.format_spec or piece.conversion != -1
            )
            if formatted or isinstance(value, Symbol) or not isinstance(value, str | int | float):
                return self._unread(node)
            texts.append(str(value))
        return "".join(texts)


def _is_joinable(left: Any, right: Any) -> bool:
    """Whether both are texts, lists or tuples alike; a symbol is no text."""
    return type(left) is type(right) and isinstance(left, str | list | tuple) and not isinstance(left, Symbol)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
