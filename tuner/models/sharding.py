"""Weights in shards over processes (FSDP2): frozen ones, and those of a model that is trained without an adapter.

Adapters stay whole: their gradients, optimizer states and files are those of an unsharded model. Other trained weights
are DTensors, of which a process trains its rows (`training/parts.py`); the backward pass of each pass sums their
gradients over the processes, and leaves each its rows, so that no process ever holds whole gradients of the model.

A pass gathers the weights of a layer while it computes that layer. All processes of a group make the same passes in
the same order: each waits in every gather for the others.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import nn

from tuner.errors import UserError
from tuner.models.adapters import is_adapted
from tuner.models.freeze import decoder_layers
from tuner.models.slices import known_by_shape
from tuner.models.unwrap import unwrapped

if TYPE_CHECKING:  # models in one process do not load it
    from torch.distributed.device_mesh import DeviceMesh

    from tuner.models.load import Loaded

P = ParamSpec("P")
T = TypeVar("T")


def refuse_shards(loaded: Loaded) -> None:
    """Raise UserError for a model that cannot be held in shards; it may be on the meta device."""
    if loaded.base.quantization == "int8":
        # its layers keep the scales on the parameter object, in whose place FSDP puts another
        raise UserError(
            f"parallel.shard: {loaded.base.path} is in 8 bit, which cannot be held in shards; write "
            'quantization="nf4", or leave parallel out'
        )


def shard(loaded: Loaded, processes: DeviceMesh) -> None:
    """Keep this process's share of a model's weights, but for trained adapters, in place.

    All processes make the call together, for a model as it will be trained, with all its adapters. A model that was
    loaded in shards stays as it is. Raises UserError where `refuse_shards` does.
    """
    if is_sharded(loaded.model):
        return
    refuse_shards(loaded)
    adapters = {
        weight for weight in loaded.model.parameters() if weight.requires_grad and is_adapted(loaded.model)
    }
    with known_by_shape(loaded.transformer):
        divide(loaded.transformer, processes, adapters)


def divide(transformer: nn.Module, processes: DeviceMesh, whole: Collection[nn.Parameter] = ()) -> None:
    """Keep this process's share of a transformer's weights, which may be on the meta device; `whole`: but for these."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    family, ignored = type(transformer).__name__, set(whole)
    units: tuple[Any, ...] = (*decoder_layers(transformer)[1], transformer)
    for part in units:
        # True for the transformer, too: by default embedding and head stay gathered after a pass without gradients,
        # and a pass after the next update would use them as they were before it
        fully_shard(part, mesh=processes, reshard_after_forward=True, ignored_params=ignored)
        # sums: losses are divided by the step's global totals; gloo has no other reduction, and NCCL's is wrong in bf16
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    # FSDP's own is a subclass with a name of its own; transformers finds a family's names in files by that of the class
    type(transformer).__name__ = family
    vars(transformer)["run_pass"] = types.MethodType(_run_pass if whole else _run_trained, transformer)
    register_fsdp_forward_method(transformer, "run_pass")


def gathered(forward_pass: Callable[P, T]) -> Callable[P, T]:
    """Make a function of a model run as a pass of that model, in which its shards are gathered.

    FSDP gathers the weights outside of layers (embedding, last norm, head) around methods of the transformer that it
    knows; our passes call the decoder, and multiply by the head themselves. They return tensors or tuples of them.
    """

    @functools.wraps(forward_pass)
    def run(*arguments: P.args, **settings: P.kwargs) -> T:
        run_pass = getattr(unwrapped(arguments[0]), "run_pass", None)  # type: ignore[arg-type]
        if run_pass is None:
            return forward_pass(*arguments, **settings)
        return run_pass(forward_pass, *arguments, **settings)

    return run


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Hold a model whole in every process, which then may make passes of its own, such as those of generation.

    All processes enter and leave together. A model that is not in shards stays as it is.
    """
    units = _units(model)
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether several processes hold the model's weights together."""
    return bool(_units(model))


def weights_by_layer(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The state_dict of a model without peft's wrapper, part by part: what is outside of layers, then each layer.

    Weights in shards are gathered, on the device and one part at a time; the processes that hold them together iterate
    together. Tied weights are one tensor under several names.
    """
    stack, layers = decoder_layers(model)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(len(layers) + 1)]
    for name, weight in model.state_dict(keep_vars=True).items():
        of_layer = name.removeprefix(f"{stack}.").partition(".")[0] if name.startswith(f"{stack}.") else "-1"
        parts[int(of_layer) + 1][name] = weight
    for part in parts:
        gathered = {id(weight): _whole(weight) for weight in part.values()}
        yield {name: gathered[id(weight)] for name, weight in part.items()}


def _whole(weight: Any) -> torch.Tensor:
    return weight.full_tensor().detach() if hasattr(weight, "full_tensor") else weight.detach()


def _units(model: nn.Module) -> list[Any]:
    """The parts of a model that are gathered at a time, the transformer first; none of an unsharded model."""
    transformer = unwrapped(model)
    if not hasattr(transformer, "run_pass"):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in transformer.modules() if isinstance(module, FSDPModule)]


def _run_pass(transformer: nn.Module, forward_pass: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    return forward_pass(*arguments, **settings)


def _run_trained(
    transformer: nn.Module, forward_pass: Callable[..., T], *arguments: Any, **settings: Any
) -> T:
    """The same where shards are trained. Autocast would keep its casts of trained weights until it ends: of weights
    that are gathered for a layer at a time, a whole model."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return forward_pass(*arguments, **settings)
    finally:
        torch.set_autocast_cache_enabled(enabled)
