"""Saving: standard folders that other tools read, with the record of the base."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from tuner.errors import UserError
from tuner.models.adapter_kinds import has_score
from tuner.models.adapters import is_adapted, save_adapter
from tuner.models.base_record import FILE as RECORD
from tuner.models.base_record import BaseReference, write_record
from tuner.models.chat import answer_ends
from tuner.models.fingerprint import fingerprint
from tuner.models.folder_files import first_line
from tuner.models.library_output import without_library_output
from tuner.models.load import Loaded, Precision
from tuner.models.sharding import is_sharded, weights_by_layer
from tuner.models.tokenizer import save_tokenizer

__all__ = ["fingerprint", "save_full", "save_model"]

_SHARD = "5GB"
_FILE_BYTES = 5 * 10**9
"""The same as a number."""


def save_model(loaded: Loaded, folder: Path, *, precision: Precision | None = None) -> None:
    """Write a model folder: an adapter as a PEFT folder in fp32, full weights in the family's own layout.

    Beside the weights stands what `write_companions` writes. precision: of full weights in the file,
    by default what the model was loaded with. Raises UserError when the disk is full or the folder cannot be
    written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if is_adapted(loaded.model):
            save_adapter(loaded.model, folder, _path_for_other_tools(loaded.base))
        else:
            save_full(loaded.transformer, folder, precision or loaded.precision)
        write_companions(loaded, folder)


def write_companions(loaded: Loaded, folder: Path) -> None:
    """Write what stands beside the weights in every model folder: the tokenizer with its chat template, for a language
    model the tokens that end an answer, and tuner.json naming the base."""
    save_tokenizer(loaded.tokenizer, folder)
    if not has_score(loaded.transformer):
        settings = copy.deepcopy(loaded.transformer.generation_config)
        # a base's own end token may not end a chat turn: other tools would run past it
        settings.eos_token_id = sorted(answer_ends(loaded)) or None
        settings.save_pretrained(str(folder))
    write_record(folder, loaded.base, loaded.adapter)
    mode = Path(folder, RECORD).stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)  # safetensors are written for their owner alone, whatever the umask


def take_part_in_saving(loaded: Loaded) -> None:
    """What the other processes that hold a model together do while one saves it: give their shards of each layer."""
    if is_sharded(loaded.model) and not is_adapted(loaded.model):
        for _ in weights_by_layer(loaded.transformer):
            pass


def save_full(model: PreTrainedModel, folder: Path, precision: Precision) -> None:
    """Write weights and config.json as the model's family does, safetensors shards of 5 GB.

    Of a model in shards the other processes call `take_part_in_saving` meanwhile.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if is_sharded(model):
        _save_by_layer(model, folder, dtype)
    else:
        _save_at_once(model, folder, dtype)
    _write_dtype(folder / "config.json", str(dtype).removeprefix("torch."))


def _save_at_once(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    cast = _cast(model.state_dict(), dtype)
    # a copy: the model in memory stays in fp32, as it may be trained or measured further
    with without_library_output():
        model.save_pretrained(str(folder), state_dict=cast, max_shard_size=_SHARD)


def _save_by_layer(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """The same with the weights of one file in memory at a time."""
    parts, num_bytes = list[Path](), 0
    for weights in _by_file(model, dtype):
        # each as if it were a model: names and layouts are then transformers' own
        parts.append(folder / f"part-{len(parts)}")
        num_bytes += _num_bytes(weights)
        with without_library_output():
            model.save_pretrained(str(parts[-1]), state_dict=weights, max_shard_size="1000TB")
    num_weights = sum(weight.numel() for weight in model.parameters())
    _join_parts(parts, folder, {"total_parameters": num_weights, "total_size": num_bytes})


def _by_file(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The weights of a model in shards on the host, in parts of at most the size of a file, or of one layer."""
    held: dict[str, Tensor] = {}
    for weights in weights_by_layer(model):
        cast = _cast(weights, dtype)
        if held and _num_bytes(held) + _num_bytes(cast) > _FILE_BYTES:
            yield held
            held = {}
        held |= cast
    yield held


def _join_parts(parts: list[Path], folder: Path, metadata: dict[str, int]) -> None:
    """Make one model folder of several that hold some of a model's weights each. metadata: of its index."""
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        suffix = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        file = (part / "model.safetensors").rename(folder / f"model{suffix}.safetensors")
        with safe_open(file, "pt") as weights:
            weight_map |= dict.fromkeys(weights.keys(), file.name)
        for other in part.iterdir():  # such as config.json, the same in all
            other.replace(folder / other.name)
        part.rmdir()
    if len(parts) > 1:
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights on the host in a dtype, so that tied ones stay one."""
    cast: dict[int, Tensor] = {}
    for weight in weights.values():
        if weight.data_ptr() not in cast:
            cast[weight.data_ptr()] = weight.to("cpu", dtype if weight.is_floating_point() else weight.dtype)
    return {name: cast[weight.data_ptr()] for name, weight in weights.items()}


def _num_bytes(weights: Mapping[str, Tensor]) -> int:
    return sum({weight.data_ptr(): weight.nbytes for weight in weights.values()}.values())


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of writing into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as a SafetensorError
        raise UserError(
            f"{folder}: cannot be written ({first_line(error)}); "
            "free space or check its permissions, then go on"
        ) from error


def _write_dtype(file: Path, dtype: str) -> None:
    """Correct the dtype in config.json: transformers writes that of the model in memory, fp32 in training."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values["torch_dtype" if "torch_dtype" in values else "dtype"] = dtype
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _path_for_other_tools(base: BaseReference) -> str:
    """The base's path for other tools, which cannot resolve `tuner:` or paths relative to our working directory."""
    return base.found_at or base.path
