"""A model folder, or a run's adapter, as a GGUF file."""

from __future__ import annotations

from pathlib import Path

from gguf import MODEL_ARCH_NAMES, GGUFWriter

from tuner.errors import UserError
from tuner.models.locate import stored_quantization
from tuner.models.model_file import read_model_file
from tuner.models.save import disk_errors
from tuner.models.to_gguf.families import read_shape, write_shape
from tuner.models.to_gguf.vocabulary import read_vocabulary, write_vocabulary
from tuner.models.to_gguf.weights import KINDS, Storage, Weight, weights_of
from tuner.models.tokenizer import read_tokenizer


def write_gguf(folder: Path, file: Path, *, name: str, storage: Storage = "bf16") -> None:
    """Write a complete model folder as a GGUF file; one weight at a time is in memory.

    name: shown by programs that list models. Raises UserError for a reward model, quantized weights, a family that is
    not known (see FAMILIES), or a tokenizer that llama.cpp would read otherwise.
    """
    _check(folder)
    shape = read_shape(folder)
    tokenizer = read_tokenizer(folder)
    weights = weights_of(shape, storage)
    rows = next(weight.shape[0] for weight in weights if weight.name == "token_embd.weight")
    vocabulary = read_vocabulary(tokenizer, folder, rows)
    with disk_errors(file):
        writer = GGUFWriter(file, MODEL_ARCH_NAMES[shape.family.arch])
        writer.add_type("model")
        writer.add_name(name)
        write_shape(writer, shape)
        write_vocabulary(writer, vocabulary, tokenizer, folder)
        writer.add_quantization_version(2)
        writer.add_file_type(KINDS[storage][1])
        write_weights(writer, weights)


def write_weights(writer: GGUFWriter, weights: list[Weight]) -> None:
    """Write everything into the file: what was added so far, then the weights one by one."""
    for weight in weights:
        size = weight.stored_dtype.itemsize
        for length in weight.stored_shape:
            size *= length
        writer.add_tensor_info(weight.name, weight.stored_shape, weight.stored_dtype, size, weight.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for weight in weights:
        writer.write_tensor_data(weight.read())
    writer.close()


def _check(folder: Path) -> None:
    if read_model_file(folder).has_score:
        raise UserError(
            f"{folder}: a reward model, and a GGUF file has no place for its head; leave --format out, and serve it "
            "with vLLM"
        )
    if (quantization := stored_quantization(folder)) is not None:
        raise UserError(
            f"{folder}: its weights are stored in {quantization}; name the model that is not quantized"
        )
