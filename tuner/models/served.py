"""Model folders for servers of other tools: the base of a policy, and its weights after an update.

InternLM2 is written as transformers' Llama, whose layer names its adapters have. The base is dequantized: it is then
what the 4-bit layers multiply with, and the server needs no kernels for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tuner.config import Model
from tuner.errors import UserError
from tuner.models.adapter_file import read_adapter_file
from tuner.models.adapters import is_adapted, save_adapter
from tuner.models.internlm2 import MODEL_TYPE, InternLM2Config
from tuner.models.layout import Layout, in_layout
from tuner.models.load import Loaded, Precision, load_base
from tuner.models.locate import Location, locate
from tuner.models.model_file import read_model_file
from tuner.models.quantization import dequantize
from tuner.models.save import disk_errors, save_full, write_companions
from tuner.models.tokenizer import read_tokenizer
from tuner.models.vocabulary import grow_embeddings, vocabulary_size


def is_servable(model: Model) -> bool:
    """Whether the base's folder can be served as it is, without being written anew."""
    location = locate(model)
    reference = location.reference
    changed = reference.quantization or reference.rope or reference.embedding_rows or model.resize_embeddings
    return not changed and read_model_file(location.base_folder).model_type != MODEL_TYPE


def write_served_base(model: Model, folder: Path, precision: Precision) -> None:
    """Write the base of a model, without its adapter, as it computes in a run of this precision.

    Needs memory for the base in that precision, on the CPU. Raises UserError as `load_model` does.
    """
    location = locate(model, precision)
    tokenizer = read_tokenizer(location.tokenizer_folder, trust_remote_code=model.trust_remote_code)
    if model.resize_embeddings and location.reference.embedding_rows is None:
        location = location.with_reference(embedding_rows=vocabulary_size(tokenizer))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    base = load_base(
        location,
        dtype,
        compute_dtype=dtype,
        device=torch.device("cpu"),
        trust_remote_code=model.trust_remote_code,
    )
    grow_embeddings(base, location.reference.embedding_rows, tokenizer)
    dequantize(base)
    _write_complete(Loaded(base, tokenizer, location.reference, None, precision), folder)


def write_served_policy(loaded: Loaded, folder: Path) -> None:
    """Write what a server needs of a policy in training: its adapter as a PEFT folder, or its full weights."""
    with disk_errors(folder):
        if is_adapted(loaded.model):
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter(loaded.model, folder, loaded.base.found_at or loaded.base.path)
        else:
            _write_complete(loaded, folder)


def _write_complete(loaded: Loaded, folder: Path) -> None:
    with disk_errors(folder):
        save_full(in_layout(loaded.transformer, _layout(loaded.transformer)), folder, loaded.precision)
        write_companions(loaded, folder)


def _layout(model: PreTrainedModel) -> Layout:
    return "llama" if isinstance(model.config, InternLM2Config) else "own"


def refuse_unservable(settings: Any, where: str) -> None:
    """Raise UserError for an adapter that vLLM does not load as it computes here.

    settings: peft's of the adapter, or those of its file.
    """
    unknown = {
        "modules_to_save": "modules that are trained whole (adapter.train_whole)",
        "trainable_token_indices": "rows of new tokens (resize_embeddings)",
        "target_parameters": "adapters of parameters (adapter.target_parameters)",
        "rank_pattern": "a rank of its own for some layers",
        "alpha_pattern": "an alpha of its own for some layers",
        "lora_bias": "biases",
    }
    for name, meaning in unknown.items():
        if getattr(settings, name, None):
            raise UserError(
                f"{where}: vLLM loads no adapter with {meaning}; write engine=local, or train without them"
            )


def adapter_rank(location: Location) -> int:
    """Rank of a saved adapter. Raises UserError for one that vLLM does not load."""
    assert location.adapter_folder is not None
    settings = read_adapter_file(location.adapter_folder)
    refuse_unservable(settings, str(location.adapter_folder))
    return settings.r
