"""`tuner score`: a reward model's scores of the rows of a file, streamed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TextIO

import typer

from tuner.cli.trust import Trust
from tuner.printable import echo


def score(
    model: Annotated[str, typer.Argument(help="Reward model: run, checkpoint or model folder, or hub name.")],
    file: Annotated[
        str, typer.Argument(help="Rows to score: conversations, or preferences (every answer is scored).")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file to write; default: standard output.")
    ] = None,
    condition: Annotated[str | None, typer.Option(help="Condition of rows without one.")] = None,
    standardize: Annotated[
        bool,
        typer.Option(
            help="Standardize scores by the mean and standard deviation of the model's held-out scores."
        ),
    ] = False,
    template: Annotated[
        str, typer.Option(help='Chat template; "tokenizer": the model\'s own.')
    ] = "tokenizer",
    precision: Annotated[
        str | None, typer.Option(help="bf16 or fp32; default: the training precision.")
    ] = None,
    tokens_per_pass: Annotated[int, typer.Option(min=1, help="Maximum tokens in a forward pass.")] = 16_384,
    trust: Trust = False,
) -> None:
    """Score rows with a reward model: each is written with its "score", or with the "scores" of its answers."""
    from functools import partial

    from tuner.cli.merge import parse_precision
    from tuner.stages.reward.score_file import score_file

    write_scores = partial(
        score_file,
        model,
        file,
        condition=condition,
        standardize=standardize,
        template=template,
        precision=None if precision is None else parse_precision(precision, "--precision"),
        tokens_per_pass=tokens_per_pass,
        trust=trust,
    )
    if output is not None:
        _refuse_input(output, file)
    count = write_scores(sys.stdout) if output is None else _write_file(output, write_scores)
    place = "" if output is None else f": {output}"
    # To stderr: stdout may carry the rows.
    echo(f"{count:,} rows scored{place}", sys.stderr)


def _refuse_input(output: Path, file: str) -> None:
    """UserError where the rows would be written over themselves."""
    from tuner.errors import UserError

    if output.exists() and any(output.samefile(path) for path in _files(file)):
        raise UserError(f"--output {output}: this is the file that is scored; name another one")


def _files(pattern: str) -> list[str]:
    """The local files that FILE names, which may be a pattern."""
    from glob import glob

    return [pattern] if Path(pattern).exists() else glob(pattern, recursive=True)


def _write_file(output: Path, write: Callable[[TextIO], int]) -> int:
    """Have the rows written beside their place and moved there when they are complete; returns their number."""
    import os

    from tuner.errors import UserError
    from tuner.training.checkpoint import explain_write

    # In the same folder: os.replace is atomic only within one file system.
    unfinished = output.with_name(f".writing-{output.name}")
    try:
        with unfinished.open("w", encoding="utf-8") as lines:
            count = write(lines)
        os.replace(unfinished, output)
    except OSError as error:
        explanation = explain_write(error, output)
        if not isinstance(explanation, UserError):
            explanation = UserError(f"{output}: cannot be written ({error.strerror}); choose another place")
        raise explanation from error
    finally:
        unfinished.unlink(missing_ok=True)
    return count
