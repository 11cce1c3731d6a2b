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

    from tuner.errors import UserError
    from tuner.models.merge import locate_adapter
    from tuner.models.merge import merge as merge_adapter

    if dtype not in ("bf16", "fp32"):
        raise UserError(f"--dtype {dtype}: write bf16 or fp32")
    precision: Literal["bf16", "fp32"] = "bf16" if dtype == "bf16" else "fp32"
    locate_adapter(run)  # said first: without one there is nothing to compare, and no rows are needed
    report = merge_adapter(run, output, dtype=precision, texts=_texts(run, text))
    if json:
        typer.echo(dumps(asdict(report) | {"output": str(report.output)}))
        return
    for name, difference in (("folding, in fp32", report.folding), (f"rounding to {dtype}", report.rounding)):
        typer.echo(
            f"{name + ':':<19} mean KL {difference.mean_kl:.2e} nats, "
            f"same likeliest token on {difference.agreement:.2%} of {report.tokens} tokens"
        )
    typer.echo(f"merged model: {report.output}")


def _texts(run: str, file: Path | None) -> list[str]:
    """What is compared on: the given text, or the rows the run itself learned from."""
    from tuner.errors import UserError

    if file is not None:
        try:
            return [file.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {file}: cannot be read ({error}); name a UTF-8 text file") from error
    from tuner.stages.rows import training_texts

    return training_texts(run)
