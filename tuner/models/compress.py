"""Quantized models for vLLM and others: AWQ, GPTQ, INT8 or FP8 by llm-compressor, in its own process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tuner.errors import UserError
from tuner.models.atomic_folder import new_folder
from tuner.models.load import Precision
from tuner.models.locate import stored_quantization
from tuner.models.model_file import read_model_file
from tuner.models.save import disk_errors
from tuner.models.tokenizer import read_tokenizer, save_tokenizer
from tuner.models.tool_python import python_with, run_tool

Kind = Literal["awq", "gptq", "int8", "fp8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""awq, gptq: weights in 4 bits; int8, fp8: weights and the inputs of their products in 8."""


@dataclass(frozen=True)
class CalibrationRows:
    """Rows that a quantization is fitted to, and rows that its loss is measured on."""

    calibration: Sequence[list[int]]
    held_out: Sequence[tuple[list[int], list[float]]]
    """(tokens, weights of their losses)."""
    held_out_name: str
    """Which rows those are, in words."""


@dataclass(frozen=True)
class Losses:
    """Mean loss in nats per token on held-out rows."""

    before: float
    after: float


def compressor_python(kind: str) -> str:
    """The Python that has llm-compressor. Raises UserError where none has."""
    return python_with("llmcompressor", "llmcompressor", f"--quantize {kind}")


def compress(folder: Path, output: Path, kind: Kind, *, dtype: Precision, rows: CalibrationRows) -> Losses:
    """Write a quantized copy of a complete model folder, in compressed-tensors' format; returns its loss before and
    after.

    dtype: of the weights that are not quantized, and of the computation. Raises UserError for a reward model, a model
    that is quantized already, and where llm-compressor is missing or fails.
    """
    if read_model_file(folder).has_score:
        raise UserError(
            f"{folder}: a reward model; leave --quantize out, for its scores would not be comparable"
        )
    if (stored := stored_quantization(folder)) is not None:
        raise UserError(
            f"{folder}: its weights are stored in {stored} already; name the model that is not quantized"
        )
    order = {
        "model": str(folder.resolve()),
        "kind": kind,
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
        "calibration": list(rows.calibration),
        "held_out": list(rows.held_out),
    }
    program = Path(__file__).with_name("compress_child.py")
    command = [compressor_python(kind), str(program)]
    with disk_errors(output), new_folder(output) as unfinished:
        order["output"] = str(unfinished.resolve())
        answer = json.loads(run_tool(command, f"--quantize {kind}", json.dumps(order)))
        save_tokenizer(read_tokenizer(folder), unfinished)
    return Losses(answer["before"], answer["after"])
