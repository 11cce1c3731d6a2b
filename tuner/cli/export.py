"""`tuner export`: a run or model as a complete model folder for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.trust import Trust
from tuner.printable import echo


def export(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or model folder, or hub name.")],
    output: Annotated[Path, typer.Argument(help="Folder to create for the complete model.")],
    layout: Annotated[
        str,
        typer.Option(help="own: the model family's published layout; llama: InternLM2 converted to Llama."),
    ] = "own",
    dtype: Annotated[str, typer.Option(help="Precision of the saved weights: bf16 or fp32.")] = "bf16",
    text: Annotated[
        Path | None,
        typer.Option(help="Text file for verifying the merge; default: the run's training rows."),
    ] = None,
    trust: Trust = False,
) -> None:
    """Write a complete model, with its adapter merged in and the merge verified.

    Reward models keep their head: InternLM2's as v_head, others and `--layout llama` as a sequence classification
    model that transformers and vLLM load.
    """
    from tuner.cli.merge import comparison_texts, parse_precision, print_report
    from tuner.config import Model
    from tuner.errors import UserError
    from tuner.models import merge
    from tuner.models.locate import locate
    from tuner.stages.run_models import usable_path

    if layout not in ("own", "llama"):
        raise UserError(f"--layout {layout}: no such layout; write own or llama")
    precision = parse_precision(dtype)
    model = usable_path(model, trust=trust)
    if locate(Model(path=model), weights=False).adapter_folder is None:
        merge.export(model, output, dtype=precision, layout=layout, trust=trust)
    else:
        texts = comparison_texts(model, text, trust)
        report = merge.merge(model, output, dtype=precision, texts=texts, layout=layout, trust=trust)
        print_report(report, dtype)
    echo(f"complete model: {output}")
