"""`tuner export`: a run or model as one complete folder that other tools load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or hub name.")],
    output: Annotated[Path, typer.Argument(help="New folder for the complete model.")],
    layout: Annotated[
        str, typer.Option(help="own: as its family publishes models; llama: InternLM2 as Llama.")
    ] = "own",
    dtype: Annotated[str, typer.Option(help="Precision of the written weights: bf16 or fp32.")] = "bf16",
    text: Annotated[
        Path | None,
        typer.Option(help="Text file to compare a merge on; default: rows the run was trained on."),
    ] = None,
) -> None:
    """Write a complete model, its adapter merged in and compared. Reward models keep their head: InternLM2's as
    v_head, others and `--layout llama` as a sequence classification model that transformers and vLLM load."""
    from tuner.cli.merge import precision_of, tell, texts_of
    from tuner.config import Model
    from tuner.errors import UserError
    from tuner.models import merge
    from tuner.models.locate import locate

    if layout not in ("own", "llama"):
        raise UserError(f"--layout {layout}: write own or llama")
    precision = precision_of(dtype)
    if locate(Model(path=model), weights=False).adapter_folder is None:
        merge.export(model, output, dtype=precision, layout=layout)  # type: ignore[arg-type]
    else:
        report = merge.merge(model, output, dtype=precision, texts=texts_of(model, text), layout=layout)  # type: ignore[arg-type]
        tell(report, dtype)
    typer.echo(f"complete model: {output}")
