"""`tuner export`: a run or model as a complete model for other tools."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.trust import Trust
from tuner.printable import echo

if TYPE_CHECKING:
    from tuner.models.load import Precision

_QUANTIZATIONS = {
    "gguf": ("f16", "q8_0", "q4_k_m"),
    "folder": ("awq", "gptq", "int8", "fp8"),
    "gguf-lora": (),
}


def export(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or model folder, or hub name.")],
    output: Annotated[Path, typer.Argument(help="Folder to create.")],
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="folder: a model folder; gguf: a file for llama.cpp and Ollama, with a Modelfile; gguf-lora: the "
            "adapter alone as such a file.",
        ),
    ] = "folder",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Of gguf: f16, q8_0 or q4_k_m, in place of --dtype. Of a folder, calibrated on the run's rows by "
            "llm-compressor: awq, gptq, int8 or fp8."
        ),
    ] = None,
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
    from tuner.cli.merge import parse_precision
    from tuner.models.merge import check_output
    from tuner.stages.run_models import usable_path

    _check_options(file_format, quantize, layout)
    precision = parse_precision(dtype)
    check_output(output)
    usable = usable_path(model, trust=trust)
    if file_format == "gguf-lora":
        _write_lora(usable, output, trust)
    elif file_format == "gguf":
        _write_gguf(usable, output, precision, quantize, text, trust)
    elif quantize is not None:
        _write_quantized(usable, output, precision, quantize, text, trust)
    else:
        _write_folder(usable, output, layout, precision, text, trust)


def _check_options(file_format: str, quantize: str | None, layout: str) -> None:
    from tuner.errors import UserError

    for option, value, values in (
        ("--format", file_format, ("folder", "gguf", "gguf-lora")),
        ("--layout", layout, ("own", "llama")),
    ):
        if value not in values:
            raise UserError(
                f"{option} {value}: no such {option[2:]}; write {', '.join(values[:-1])} or {values[-1]}"
            )
    if quantize is not None and quantize not in (values := _QUANTIZATIONS[file_format]):
        here = f"write {', '.join(values[:-1])} or {values[-1]}" if values else "leave --quantize out"
        raise UserError(f"--quantize {quantize}: no such quantization of --format {file_format}; {here}")
    if layout != "own" and (file_format != "folder" or quantize):
        raise UserError(f"--layout {layout}: this file has a layout of its own; leave --layout out")


def _write_folder(
    model: str, output: Path, layout: str, precision: Precision, text: Path | None, trust: bool
) -> None:
    from tuner.cli.merge import comparison_texts, print_report
    from tuner.config import Model
    from tuner.models import merge
    from tuner.models.locate import locate
    from tuner.stages.card_file import folder_form, write_card

    if locate(Model(path=model), weights=False).adapter_folder is None:
        merge.export(model, output, dtype=precision, layout=layout, trust=trust)  # type: ignore[arg-type]
    else:
        texts = comparison_texts(model, text, trust)
        report = merge.merge(model, output, dtype=precision, texts=texts, layout=layout, trust=trust)  # type: ignore[arg-type]
        print_report(report, precision)
    write_card(model, output, folder_form(model, layout))
    echo(f"complete model: {output}")


def _complete_folder(
    model: str, output: Path, precision: Precision, text: Path | None, trust: bool, *, as_llama: bool = False
) -> AbstractContextManager[Path]:
    """The model as one folder, an adapter merged into its base, which the console then reports on."""
    from tuner.cli.merge import comparison_texts, print_report
    from tuner.models.complete_folder import complete_folder

    return complete_folder(
        model,
        output,
        dtype=precision,
        texts=lambda: comparison_texts(model, text, trust),
        say=lambda report: print_report(report, precision),
        trust=trust,
        as_llama=as_llama,
    )


def _write_gguf(
    model: str, output: Path, precision: Precision, quantize: str | None, text: Path | None, trust: bool
) -> None:
    from tuner.models.to_gguf.export import MODEL, export_gguf
    from tuner.stages.card_file import gguf_form, write_card

    with _complete_folder(model, output, precision, text, trust) as folder:
        export_gguf(folder, output, name=_name(model), dtype=precision, quantization=quantize)  # type: ignore[arg-type]
    write_card(model, output, gguf_form(quantize or precision))
    echo(f"GGUF file: {output / MODEL}")
    echo(f"to try it with Ollama: cd {output} && ollama create {_name(model).lower()} -f Modelfile")


def _write_quantized(
    model: str, output: Path, precision: Precision, kind: str, text: Path | None, trust: bool
) -> None:
    from tuner.models.compress import compress, compressor_python
    from tuner.stages.calibration import calibration_rows
    from tuner.stages.card_file import quantized_form, write_card

    compressor_python(kind)  # before the rows are read and an adapter is merged
    rows = calibration_rows(model, trust=trust)
    with _complete_folder(model, output, precision, text, trust, as_llama=True) as folder:
        losses = compress(folder, output, kind, dtype=precision, rows=rows)  # type: ignore[arg-type]
    write_card(model, output, quantized_form(kind))
    echo(f"loss on {rows.held_out_name}: {losses.before:.4f} before, {losses.after:.4f} in {kind}")
    echo(f"quantized model: {output}")


def _write_lora(model: str, output: Path, trust: bool) -> None:
    from tuner.config import Model
    from tuner.models.locate import locate
    from tuner.models.to_gguf.export import ADAPTER, MODEL, export_lora
    from tuner.stages.card_file import gguf_adapter_form, write_card

    location = locate(Model(path=model, trust_remote_code=trust))
    export_lora(location, output, name=_name(model))
    write_card(model, output, gguf_adapter_form())
    echo(f"GGUF adapter: {output / ADAPTER}")
    echo(
        f"its base, {location.reference.path}, as {MODEL}: tuner export {location.base_folder} FOLDER --format gguf"
    )


def _name(model: str) -> str:
    """What a model is called by programs that list several."""
    return Path(model).resolve().name
