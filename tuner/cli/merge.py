"""`tuner merge`: an adapter folded into its base, compared before and after."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer


def merge(
    run: Annotated[str, typer.Argument(help="Run folder, or folder of an adapter.")],
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    dtype: Annotated[str, typer.Option(help="Precision of the written weights: bf16 or fp32.")] = "bf16",
    text: Annotated[
        Path | None, typer.Option(help="Text file to compare on; default: rows the run was trained on.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Fold a run's adapter into the de-quantised base it was trained on, and compare over real tokens."""
    from json import dumps

    from tuner.models.merge import locate_adapter
    from tuner.models.merge import merge as merge_adapter

    precision = precision_of(dtype)
    locate_adapter(run)  # said first: without one there is nothing to compare, and no rows are needed
    report = merge_adapter(run, output, dtype=precision, texts=texts_of(run, text))
    if json:
        typer.echo(dumps(asdict(report) | {"output": str(report.output)}))
        return
    tell(report, dtype)
    typer.echo(f"merged model: {report.output}")


def tell(report: object, dtype: str) -> None:
    """What a merge changed, in words."""
    from tuner.models.merge import MergeReport

    assert isinstance(report, MergeReport)
    for name, difference in (("folding, in fp32", report.folding), (f"rounding to {dtype}", report.rounding)):
        typer.echo(f"{name + ':':<19} {difference} of {report.tokens} tokens")


def precision_of(dtype: str, option: str = "--dtype") -> Literal["bf16", "fp32"]:
    """What an option says; UserError when it says something else."""
    from tuner.errors import UserError

    if dtype not in ("bf16", "fp32"):
        raise UserError(f"{option} {dtype}: write bf16 or fp32")
    return "bf16" if dtype == "bf16" else "fp32"


def texts_of(run: str, file: Path | None) -> list[str]:
    """What is compared on: the given text, or the rows the run itself learned from."""
    from tuner.errors import UserError

    if file is not None:
        try:
            return [file.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {file}: cannot be read ({error}); name a UTF-8 text file") from error
    from tuner.stages.data_view import training_texts

    return training_texts(run)
