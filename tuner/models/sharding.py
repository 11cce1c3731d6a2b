"""Frozen weights in shards over processes (FSDP2); trained ones stay whole, so that nothing else knows of it.

Adapters, their gradients, optimizer states and files are those of an unsharded model. A pass gathers the weights of a
layer while it computes that layer. All processes of a group make the same passes in the same order: each waits in
every gather for the others.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import nn

from tuner.errors import UserError
from tuner.models.freeze import decoder_layers
from tuner.models.load import Loaded
from tuner.models.unwrap import unwrapped

if TYPE_CHECKING:  # models in one process do not load it
    from torch.distributed.device_mesh import DeviceMesh

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
    if all(weight.requires_grad for weight in loaded.model.parameters()):
        raise UserError(
            f"parallel.shard: all weights of {loaded.base.path} are trained, and only frozen ones are held in shards; "
            "add adapter=LoRA(), or leave parallel out"
        )


def shard(loaded: Loaded, processes: DeviceMesh) -> None:
    """Keep this process's share of a model's frozen weights, in place; all processes make the call together.

    For a model as it will be trained: with all its adapters, and activations recomputed where they are to be. Raises
    UserError where `refuse_shards` does.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    refuse_shards(loaded)
    transformer = loaded.transformer
    trained = {weight for weight in loaded.model.parameters() if weight.requires_grad}
    for part in (*decoder_layers(transformer)[1], transformer):
        # True for the transformer, too: by default embedding and head stay gathered after a pass without gradients
        fully_shard(part, mesh=processes, reshard_after_forward=True, ignored_params=trained)
    vars(transformer)["run_pass"] = types.MethodType(_run_pass, transformer)
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


def _units(model: nn.Module) -> list[Any]:
    """The parts of a model that are gathered at a time, the transformer first; none of an unsharded model."""
    transformer = unwrapped(model)
    if not hasattr(transformer, "run_pass"):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in transformer.modules() if isinstance(module, FSDPModule)]


def _run_pass(transformer: nn.Module, forward_pass: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    return forward_pass(*arguments, **settings)
