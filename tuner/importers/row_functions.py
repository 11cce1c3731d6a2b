"""Functions in a config file that rename the columns of rows to those of the row shapes."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping

from tuner.importers.config_text import python_text
from tuner.importers.part import Function, Part
from tuner.importers.recipe import Recipe

MESSAGES = ("messages", "conversations", "conversation")
"""Columns of turns that are recognized."""
_TURNS = (("from", "value"), ("role", "content"))
"""Keys of a turn that are recognized."""
_ROLES = {"user", "human", "assistant", "gpt", "system", "observation", "function_call", "tool"}


def set_row(recipe: Recipe, sources: Iterable[Part], title: str, origin: str, row: Mapping[str, str]) -> None:
    """Let sources read rows by a function that returns this row: key -> source of its value.

    title: what the function is named for; origin: where the columns come from, for its docstring.
    """
    name = re.sub(r"\W+", "_", title, flags=re.ASCII).strip("_").lower() or "rows"
    name = f"rows_{name}" if name[0].isdigit() or name == "config" or keyword.iskeyword(name) else name
    items = ", ".join(f'"{key}": {value}' for key, value in row.items())
    line = f"    return {{{items}}}"
    if len(line) > 110:
        line = (
            "    return {\n" + "".join(f'        "{key}": {value},\n' for key, value in row.items()) + "    }"
        )
    source = f'def {name}(row: dict) -> dict:\n    """{origin}"""\n{line}\n'
    unique = recipe.function_name(name, source)
    for part in sources:
        part["shape"] = Function(unique)


def cell(column: str) -> str:
    """The source of a row's cell."""
    return f"row[{python_text(column)}]"


def messages(column: str, role: str, content: str, roles: Mapping[str, str]) -> dict[str, str]:
    """The key and source of a row's turns; empty where they are recognized as they are.

    role, content: the keys of a turn; roles: the row's names of roles -> tuner's, where they are others.
    """
    roles = {name: known for name, known in roles.items() if name != known and name not in _ROLES}
    if (role, content) in _TURNS and not roles:
        return {} if column in MESSAGES else {"messages" if role == "role" else "conversations": cell(column)}
    turn = f"turn[{python_text(role)}]"
    table = ", ".join(f"{python_text(name)}: {python_text(known)}" for name, known in roles.items())
    named = f"{{{table}}}.get({turn}, {turn})" if roles else turn
    text = f"turn[{python_text(content)}]"
    return {"messages": f'[{{"role": {named}, "content": {text}}} for turn in {cell(column)}]'}
