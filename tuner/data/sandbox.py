"""Jinja's sandbox with bounds: templates come with downloaded checkpoints, and none of them may hang a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_ITEMS = 10**7
"""Items that the loops of one rendering may go through, some seconds' worth. A template whose loops are nested over a
conversation's messages takes their square."""
MOST_REPEATED = 10**6
"""Length that a text or list may be multiplied to, and bits of a power."""


class _CountedLoops(CodeGenerator):
    """Has every loop iterate over `counted` items."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:  # noqa: N802 (jinja2's name)
        # before any code is generated: a block's filters are looked up when the block begins
        for loop in list(node.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
        super().visit_Template(node, frame)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The sandbox that transformers runs chat templates in, with a limit on loops and on repeated texts.

    Raises SecurityError beyond. Call `start` before each rendering.
    """

    code_generator_class = _CountedLoops
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._items = 0
        cast("dict[str, Any]", self.filters)["counted"] = self._counted  # pyright: ignore[reportUnknownMemberType]

    def start(self) -> None:
        """Count the items of a rendering's loops from 0."""
        self._items = 0

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The product or power, unless its size is a sign of mischief."""
        if operator == "**":
            too_large = (
                isinstance(left, int) and isinstance(right, int) and _bits(left) * right > MOST_REPEATED
            )
        else:
            sizes = [len(cast("str", side)) for side in (left, right) if isinstance(side, str | list | tuple)]
            factors = [side for side in (left, right) if isinstance(side, int)]
            too_large = bool(sizes and factors) and sizes[0] * factors[0] > MOST_REPEATED
        if too_large:
            raise SecurityError(f"{operator} has a result of more than {MOST_REPEATED:,} characters or bits")
        return super().call_binop(context, operator, left, right)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._items += 1
            if self._items > MOST_ITEMS:
                raise SecurityError(f"its loops go through more than {MOST_ITEMS:,} items")
            yield item


def _bits(number: int) -> int:
    return abs(number).bit_length()
