"""Row shapes: how a row is recognized by its keys, and the function that reads it.

tuner has a table of shapes for each of three kinds of rows, in `conversation_rows.py`, `preference_rows.py` and
`prompt_rows.py`. `register_shape` adds one from anywhere.
"""

import difflib
import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from tuner.config.functions import is_function_reference, load_function
from tuner.config.imported_files import imported_files
from tuner.data.turns import Values, call_function, has, key_names, refuse, untyped
from tuner.errors import UserError

Kind = Literal["conversation", "preference", "prompt"]
"""What rows are read as: conversations or raw text, ranked answers, or prompts of a policy."""
_REGISTERED: dict[Kind, dict[str, "Shape"]] = {"conversation": {}, "preference": {}, "prompt": {}}


class Shape:
    """The keys that a shape is recognized by (all of any one choice), and the function (row, origin) that reads it.

    lists: those of the keys whose value must be a list.
    """

    def __init__(
        self, read: Callable[[Values, str], Any], *keys: tuple[str, ...], lists: tuple[str, ...] = ()
    ):
        self.read = read
        self.keys = keys
        self.lists = lists

    def fingerprint(self) -> str:
        """Hash of the keys and of the source the reader stands in: its file, or itself where it is typed in a notebook.

        Of a file, the user's modules that it imports count as well.

        Raises TypeError or OSError when the reader has no source.
        """
        file = Path(inspect.getfile(self.read))
        source = file.read_text(encoding="utf-8") if file.is_file() else inspect.getsource(self.read)
        imported = [module.read_bytes() for module in imported_files(file)] if file.is_file() else []
        return hashlib.blake2b(repr((self.keys, source, imported)).encode()).hexdigest()

    def matches(self, row: Values) -> bool:
        """Whether the row has all keys of one of the choices."""
        has_keys = any(all(has(row, key) for key in choice) for choice in self.keys)
        return has_keys and all(isinstance(untyped(row[key]), list) for key in self.lists)


def register_shape(kind: Kind, name: str, read: Callable[[Values, str], Any], *keys: tuple[str, ...]) -> None:
    """Add a shape of rows, recognized before those that come with tuner, and selectable by `Source(shape=name)`.

    read: from (row, its `file:line`) to a Conversation or Document, a Preference, or a Prompt, by the kind. keys: a row
    with all keys of any of these choices has the shape. Raises UserError when the source of `read` is nowhere, for
    tokens are cached by it.
    """
    shape = Shape(read, *keys)
    try:
        shape.fingerprint()
    except (TypeError, OSError) as error:
        raise UserError(
            f"row shape {name!r}: {read!r} has no source, by which cached tokens are told from older ones; register a "
            "function that is defined in a file"
        ) from error
    _REGISTERED[kind][name] = shape


def registered_shapes(kind: Kind) -> Mapping[str, Shape]:
    """The shapes added by `register_shape`."""
    return _REGISTERED[kind]


def registered_fingerprints() -> dict[str, str]:
    """Fingerprint of every registered shape, for the cache key."""
    return {
        f"{kind}/{name}": shape.fingerprint()
        for kind, shapes in _REGISTERED.items()
        for name, shape in shapes.items()
    }


class Reader:
    """Reads the rows of one source, all of one shape.

    The shape is named by the config or recognized from the first row, and every further row must have it. A function
    of the user's may instead make a row of any of the shapes from each row. Raises UserError with `file:line` for
    rows of another shape.
    """

    def __init__(self, shape: str | None, shapes: Mapping[str, Shape]):
        self._shapes = shapes
        self._function = None
        if shape is not None and shape not in shapes:
            self._function = _load_shape_function(shape, shapes)
        self._shape = None if self._function else shape
        self._named = self._shape is not None

    @property
    def uses_function(self) -> bool:
        """Whether rows go through a function of the user's."""
        return self._function is not None

    def shape_of(self, row: Values, origin: str) -> Shape | None:
        """The shape that every row has; None where a function of the user's makes the rows."""
        if self._function is not None:
            return None
        self._shape = self._shape or recognize(row, origin, self._shapes)
        return self._shapes[self._shape]

    def read(self, row: Values, origin: str) -> Any:
        """Read one row. origin: its `file:line`."""
        if self._function is not None:
            row = call_function(self._function, row, origin)
            # it may return a different shape for each row
            name = recognize(row, origin, self._shapes)
            return self._shapes[name].read(row, origin)
        shape, name = self.shape_of(row, origin), self._shape
        assert shape is not None
        if not shape.matches(row):
            provenance = "named in the config" if self._named else "recognized from the source's first row"
            needed = " or ".join("+".join(f'"{key}"' for key in choice) for choice in shape.keys)
            refuse(
                origin,
                f"not a {name} row (the shape {provenance}): it needs {needed}, it has {key_names(row)}",
            )
        return shape.read(row, origin)


def recognize(row: Values, origin: str, shapes: Mapping[str, Shape]) -> str:
    """Name of the first shape that a row matches; UserError when there is none."""
    for name, shape in shapes.items():
        if shape.matches(row):
            return name
    # the shapes of single sets, which have more keys, would fill the screen
    *others, last = ["+".join(shape.keys[0]) for shape in shapes.values() if len(shape.keys[0]) <= 2]
    raise UserError(
        f"{origin}: this row's shape is unknown (keys: {key_names(row)}); it needs {', '.join(others)} or {last}, "
        "or a Source(shape=function) that makes one of them; docs/data.md lists all shapes"
    )


def _load_shape_function(shape: str, shapes: Mapping[str, Shape]) -> Callable[..., Any]:
    if not is_function_reference(shape):
        close = difflib.get_close_matches(shape, shapes, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(shapes)}"
        raise UserError(f"shape {shape!r}: not a row shape of this kind of data; {hint}")
    return load_function(shape, "shape", f"one of {', '.join(shapes)}, or ")
