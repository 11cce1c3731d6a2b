"""A run, or a model folder, as a folder for llama.cpp and Ollama: a GGUF file and a Modelfile."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from tuner.models.atomic_folder import new_folder
from tuner.models.load import Precision
from tuner.models.locate import Location
from tuner.models.save import disk_errors
from tuner.models.to_gguf.adapter import write_lora
from tuner.models.to_gguf.k_quants import write_q4_k_m
from tuner.models.to_gguf.modelfile import modelfile
from tuner.models.to_gguf.write import write_gguf
from tuner.models.tokenizer import read_tokenizer

Quantization = Literal["f16", "q8_0", "q4_k_m"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
MODEL, ADAPTER = "model.gguf", "adapter.gguf"


def export_gguf(
    folder: Path, output: Path, *, name: str, dtype: Precision, quantization: Quantization | None
) -> None:
    """Write a complete model folder as `model.gguf` and a Modelfile.

    dtype: how matrices are stored that are not quantized. Raises UserError where the model has no GGUF form, or
    q4_k_m needs llama.cpp and it is not installed.
    """
    with disk_errors(output), new_folder(output) as unfinished:
        if quantization == "q4_k_m":
            whole = unfinished / "whole.gguf"
            write_gguf(folder, whole, name=name, storage=dtype)
            write_q4_k_m(whole, unfinished / MODEL)
            whole.unlink()
        else:
            write_gguf(folder, unfinished / MODEL, name=name, storage=quantization or dtype)
        text = modelfile(read_tokenizer(folder), folder, f"./{MODEL}")
        Path(unfinished, "Modelfile").write_text(text, encoding="utf-8")


def export_lora(location: Location, output: Path, *, name: str) -> None:
    """Write an adapter as `adapter.gguf` and a Modelfile that puts it on the base's `model.gguf`."""
    with disk_errors(output), new_folder(output) as unfinished:
        write_lora(location, unfinished / ADAPTER, name=name)
        tokenizer = read_tokenizer(location.tokenizer_folder)
        folder = location.adapter_folder or location.base_folder
        text = modelfile(tokenizer, folder, f"./{MODEL}", f"./{ADAPTER}")
        Path(unfinished, "Modelfile").write_text(text, encoding="utf-8")
