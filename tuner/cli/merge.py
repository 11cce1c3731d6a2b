"""`tuner merge`: an adapter merged into its base model, and the merge verified."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.trust import Trust
from tuner.printable import echo, printable_json

if TYPE_CHECKING:
    from tuner.models.load import Precision
    from tuner.models.merge import MergeReport


def merge(
    run: Annotated[str, typer.Argument(help="Run, checkpoint or adapter folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to create for the merged model.")],
    dtype: Annotated[str, typer.Option(help="Precision of the saved weights: bf16 or fp32.")] = "bf16",
    text: Annotated[
        Path | None, typer.Option(help="Text file for verifying the merge; default: the run's training rows.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    trust: Trust = False,
) -> None:
    """Merge a run's adapter into the dequantized base it was trained on, and compare outputs before and after."""
    from tuner.models.merge import locate_adapter
    from tuner.models.merge import merge as merge_adapter
    from tuner.stages.card_file import folder_form, write_card
    from tuner.stages.run_models import usable_path

    precision = parse_precision(dtype)
    run = usable_path(run, trust=trust)
    locate_adapter(run)  # first, since without an adapter to merge no comparison texts are needed
    texts = comparison_texts(run, text, trust)
    report = merge_adapter(run, output, dtype=precision, texts=texts, trust=trust)
    write_card(run, output, folder_form(run, "own"))
    if json:
        echo(printable_json(asdict(report) | {"output": str(report.output)}))
        return
    print_report(report, dtype)
    echo(f"merged model: {report.output}")


def print_report(report: MergeReport, dtype: str) -> None:
    """Print how much a merge changed the model's outputs."""
    for name, difference in (("merging, in fp32", report.folding), (f"rounding to {dtype}", report.rounding)):
        echo(f"{name + ':':<19} {difference} of {report.tokens} tokens")


def parse_precision(dtype: str, option: str = "--dtype") -> Precision:
    """The value of an option. Raises UserError if it is no precision."""
    from tuner.errors import UserError

    if dtype not in ("bf16", "fp32"):
        raise UserError(f"{option} {dtype}: no such precision; write bf16 or fp32")
    return dtype


def comparison_texts(run: str, file: Path | None, trust: bool) -> list[str]:
    """Texts to compare a merge on: the file's, or the first rows the run was trained on.

    trust: the user's word for the code that the run's config names.
    """
    from tuner.errors import UserError

    if file is not None:
        try:
            return [file.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {file}: cannot be read ({error}); name a UTF-8 text file") from error
    from tuner.stages.data_view import training_texts

    return training_texts(run, trust=trust)
