"""A run's LoRA adapter as a GGUF file, which llama.cpp puts on the base's (`--lora`, `lora_path`)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from gguf import MODEL_ARCH_NAMES, GGUFWriter
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch import Tensor

from tuner.errors import UserError
from tuner.models.adapter_file import AdapterFile, read_adapter_file
from tuner.models.locate import Location
from tuner.models.save import disk_errors
from tuner.models.to_gguf.families import Shape, read_shape
from tuner.models.to_gguf.weights import Values, Weight, for_llama_cpp, gguf_name, is_computed
from tuner.models.to_gguf.write import write_weights

_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def write_lora(location: Location, file: Path, *, name: str) -> None:
    """Write an adapter as a GGUF file in fp32.

    Raises UserError for a reward model, and where the adapter trained or changed what a GGUF adapter cannot hold.
    """
    folder, reference = location.adapter_folder, location.reference
    if folder is None:
        raise UserError(f"{name}: has no adapter; write --format gguf")
    if location.has_score:
        raise UserError(
            f"{name}: a reward model, and a GGUF file has no place for its head; serve it with vLLM"
        )
    shape = read_shape(location.base_folder)
    settings = read_adapter_file(folder)
    changes = {
        "trained whole modules": settings.modules_to_save,
        "has rows for new tokens": reference.embedding_rows,
        "was trained with other rotary positions": reference.rope,
        "has an alpha of its own for some layers": settings.alpha_pattern,
        "has rsLoRA's scale with a rank of its own for some layers": settings.use_rslora
        and settings.rank_pattern,
        "adapts parameters (adapter.target_parameters)": settings.target_parameters,
    }
    for change, happened in changes.items():
        if happened:
            raise UserError(
                f"{name}: its adapter {change}, which a GGUF adapter cannot hold; write --format gguf"
            )
    weights = list(_weights(load_file(str(folder / "adapter_model.safetensors")), shape, folder))
    with disk_errors(file):
        writer = GGUFWriter(file, MODEL_ARCH_NAMES[shape.family.arch])
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", _alpha(settings))
        write_weights(writer, weights)


def _alpha(settings: AdapterFile) -> float:
    """The alpha that llama.cpp, which scales by alpha / rank, is to be given for the adapter's scale.

    rsLoRA's is alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
    """
    return settings.lora_alpha * math.sqrt(settings.r) if settings.use_rslora else float(settings.lora_alpha)


def _weights(tensors: dict[str, Tensor], shape: Shape, folder: Path) -> Iterator[Weight]:
    for key in sorted(tensors):
        match = _LORA.fullmatch(key)
        name = f"{match[1]}.weight" if match else key
        if match is None or is_computed(name, shape):
            raise UserError(f"{folder}: a GGUF adapter has no place for {key}; write --format gguf")
        weight = tensors[key].float()
        if match[2] == "B":
            weight = for_llama_cpp(weight, name, shape)
        yield Weight(
            f"{gguf_name(name, shape)}.lora_{match[2].lower()}", tuple(weight.shape), Kind.F32, Values(weight)
        )
