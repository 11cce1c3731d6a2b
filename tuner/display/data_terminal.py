"""`tuner data` in a terminal: tokens as they are trained on, statistics, and findings."""

from rich.console import Group, RenderableType
from rich.table import Table

from tuner.data.data_report import DataReport
from tuner.data.encoding import Tokenizer
from tuner.data.examples import Examples
from tuner.data.inspection import (
    Label,
    Passes,
    describe,
    errors,
    groups,
    notices,
    pieces,
    readings,
    statistics,
)
from tuner.display.rich_text import rich_text


def data_terminal(
    examples: Examples,
    tokenizer: Tokenizer,
    passes: Passes | None = None,
    report: DataReport | None = None,
    *,
    color: bool = True,
    limit: int = 4,
    label: Label = lambda index: "",
    tokens_per_pass: int | None = None,
) -> RenderableType:
    """The first samples (or passes) with their tokens, statistics and findings, for a rich console.

    Tokens that the loss is taken on are green, special tokens blue; without color the former stand in ⟦ ⟧.
    """
    shown: list[RenderableType] = []
    for group in groups(examples, passes, limit):
        if group.heading:
            shown += [rich_text(group.heading, style="bold reverse"), rich_text()]
        for segment in group.segments:
            title = rich_text(describe(examples, segment, label), style="bold")
            shown += [title, _tokens(examples, segment.index, tokenizer, color), rich_text()]
    shown.append(_statistics(statistics(examples, report, passes, tokens_per_pass)))
    shown += [rich_text(f"\n{description}: {names}") for description, names in readings(report)]
    shown += [rich_text(f"\nerror: {text}", style="red") for text in errors(examples, tokenizer, report)]
    shown += [rich_text(f"\nnote: {text}", style="yellow") for text in notices(examples, tokenizer, report)]
    return Group(*shown)


def _statistics(values: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in values:
        table.add_row(rich_text(name), rich_text(value))
    return table


def _tokens(examples: Examples, index: int, tokenizer: Tokenizer, color: bool) -> RenderableType:
    text, previous_weight = rich_text(), 0.0
    for number, piece in enumerate(pieces(examples, index, tokenizer)):
        if not color and bool(piece.weight) != bool(previous_weight):
            text.append("⟦" if piece.weight else "⟧")
        previous_weight = piece.weight
        style = "dim"
        if piece.weight:
            style = "black on green" if number % 2 else "black on bright_green"
        elif piece.control:
            style = "blue"
        text.append_text(rich_text(piece.text.replace("\n", "⏎\n"), style if color else ""))
    if previous_weight and not color:
        text.append("⟧")
    return text
