"""A transformer from its files: whole, in shards that no device ever held together, or without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tuner.models.adapter_kinds import SCORE
from tuner.models.internlm2 import MODEL_TYPE as INTERNLM2
from tuner.models.quantization import after_quantizing
from tuner.models.sharding import divide
from tuner.models.slices import cut, hold_rows, keep_rows

if TYPE_CHECKING:  # models in one process do not load it
    from torch.distributed.device_mesh import DeviceMesh

QUANTIZED = "quantization_config"
"""The option of `from_pretrained` by which a model is quantized while it is loaded."""


def from_weights(
    auto_class: Any,
    values: PreTrainedConfig,
    folder: Path,
    options: dict[str, Any],
    processes: DeviceMesh | None,
    *,
    trained: bool = True,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with the weights in a folder, and transformers' report on which of them were missing.

    processes: those that hold the model together, of which each reads its slices alone. trained: whether all weights
    are; a frozen model is put in shards later (`sharding.shard`), with its adapters.
    """
    if processes is not None and not _reads_slices(values, options, processes):
        processes = None
    if processes is not None:
        options.pop("device_map", None)  # each process's own device, which transformers finds by itself
    with _loaded_in_parts(processes, options, trained) as of_parts:
        transformer, report = auto_class.from_pretrained(
            str(folder),
            config=values,
            # pickled weights could run code while they are read
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else they are a table in the log; _check_report names them in a sentence
            **options,
            **of_parts,
        )
    if processes is not None and not trained:
        hold_rows(transformer, processes)
    vars(transformer.config).pop("distributed_config", None)  # else it would be saved with the model
    return transformer, report


def from_config(
    auto_class: Any, values: PreTrainedConfig, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model on the meta device, and the report of a load in which nothing was wrong."""
    with torch.device("meta"):
        transformer = auto_class.from_config(values, **options)
    report = {f"{kind}_keys": set() for kind in ("missing", "unexpected", "mismatched")}
    return transformer, {**report, "error_msgs": []}


def can_be_sliced(values: PreTrainedConfig, processes: int, *, in_4_bit: bool) -> bool:
    """Whether processes can read their rows alone: of InternLM2's `wqkv`, which has them by key heads, not any rows.

    in_4_bit: linear layers are quantized as they are loaded, for which they are read whole, one after another.
    """
    return in_4_bit or values.model_type != INTERNLM2 or values.num_key_value_heads % processes == 0


def _reads_slices(values: PreTrainedConfig, options: dict[str, Any], processes: DeviceMesh) -> bool:
    # on a machine with GPUs transformers reads slices onto those
    right_device = (processes.device_type == "cuda") == torch.cuda.is_available()
    return right_device and can_be_sliced(values, processes.size(), in_4_bit=QUANTIZED in options)


@contextmanager
def _loaded_in_parts(
    processes: DeviceMesh | None, options: dict[str, Any], trained: bool
) -> Iterator[dict[str, Any]]:
    """Options of `from_pretrained`, which inside this context divides the models that it loads over the processes.

    trained: they are in shards at once; else adapters are put on them first (`slices.py`).
    """
    if processes is None:
        yield {}
        return
    from transformers.distributed.configuration_utils import DistributedConfig

    def divide_model(model: PreTrainedModel, *_: Any) -> PreTrainedModel:
        model.tie_weights()  # as FSDP finds them: tied later, they would be gathered, and their gradients summed, apart
        if trained:
            divide(model, processes)
        else:
            cut(model, processes, whole=[SCORE])
        return model

    # its own division has other groups of weights: a head that is gathered in its forward pass only, which ours are not
    # (models/forward.py multiplies by its weight), and that stays gathered after passes without gradients
    vars_of_base: Any = PreTrainedModel
    vars_of_base.maybe_distribute_model = staticmethod(divide_model)
    try:
        with (
            after_quantizing(partial(keep_rows, processes=processes))
            if QUANTIZED in options
            else nullcontext()
        ):
            yield {"distributed_config": DistributedConfig(fsdp_size=torch.distributed.get_world_size())}
    finally:
        del vars_of_base.maybe_distribute_model  # the inherited one is there again
