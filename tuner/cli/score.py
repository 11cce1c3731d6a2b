"""`tuner score`: scores of rows, streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def score(
    model: Annotated[str, typer.Argument(help="Reward model: run folder, model folder or hub name.")],
    file: Annotated[
        str, typer.Argument(help="Rows: conversations, or preferences, whose answers are scored.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file to write; default: stdout.")
    ] = None,
    condition: Annotated[str | None, typer.Option(help="Condition of rows that name none.")] = None,
    standardize: Annotated[
        bool, typer.Option(help="In standard deviations from the mean of the model's held-out scores.")
    ] = False,
    template: Annotated[
        str, typer.Option(help='Chat template; "tokenizer" is the model\'s own.')
    ] = "tokenizer",
    precision: Annotated[str | None, typer.Option(help="bf16 or fp32; default: as in training.")] = None,
    tokens_per_pass: Annotated[int, typer.Option(min=1, help="Tokens in one forward pass.")] = 16_384,
) -> None:
    """Score rows: each comes back with "score", or "scores" of its answers in the order of the file."""
    import os
    import sys

    from tuner.cli.merge import precision_of
    from tuner.errors import UserError
    from tuner.stages.reward.score_file import score_file
    from tuner.training.checkpoint import explain_write

    options = {
        "condition": condition,
        "standardize": standardize,
        "template": template,
        "precision": None if precision is None else precision_of(precision, "--precision"),
        "tokens_per_pass": tokens_per_pass,
    }
    if output is None:
        count = score_file(model, file, sys.stdout, **options)  # type: ignore[arg-type]
        typer.echo(f"{count:,} rows scored", err=True)
        return
    unfinished = output.with_name(f".writing-{output.name}")
    try:
        with unfinished.open("w", encoding="utf-8") as lines:
            count = score_file(model, file, lines, **options)  # type: ignore[arg-type]
        os.replace(unfinished, output)
    except OSError as error:
        explained = explain_write(error, output)
        raise (
            explained
            if isinstance(explained, UserError)
            else UserError(f"{output}: cannot be written ({error.strerror}); choose another place")
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    typer.echo(f"{count:,} rows scored: {output}", err=True)
