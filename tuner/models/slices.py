"""Frozen weights of which each process reads its rows alone, from their files until the model is in shards.

Between the two a weight is a plain one of this process's rows, which says what it is a part of: no pass can use it, but
adapters are put on such a model as on any other. 4-bit weights are quantized whole, one after another, before all but
the rows are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tuner.models.quantization import quantized_layers

if TYPE_CHECKING:  # models in one process do not load it
    from torch.distributed.device_mesh import DeviceMesh

_NAME = "part_of"
"""Attribute of a weight of which this process has only some rows: a `_Whole`."""


@dataclass(frozen=True)
class _Whole:
    """The weight that some rows are a part of."""

    shape: torch.Size
    processes: DeviceMesh

    def with_rows(self, rows: torch.Tensor) -> Any:
        """A DTensor of this process's rows."""
        from torch.distributed.tensor import DTensor, Shard

        strides = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            rows, self.processes, [Shard(0)], run_check=False, shape=self.shape, stride=strides
        )


def whole_shape(weight: torch.Tensor) -> torch.Size:
    """The shape of a weight, of which this process may have only some rows."""
    part: _Whole | None = getattr(weight, _NAME, None)
    return weight.shape if part is None else part.shape


def cut(model: nn.Module, processes: DeviceMesh, whole: Iterable[str]) -> None:
    """Make transformers read this process's rows of a model's weights, on the meta device and in place.

    whole: modules to leave. Left are also fused experts, by whose shape adapters of parameters are made, and layers to
    be quantized: see `keep_rows`.
    """
    left = {weight for name in whole for weight in _submodule_weights(model, name)}
    left |= {layer.weight for _, layer in quantized_layers(model)}

    def in_parts(weight: nn.Parameter) -> nn.Parameter:
        if weight in left or weight.ndim not in (1, 2):
            return weight
        rows = weight.detach()[_own_rows(weight, processes)]
        return nn.Parameter(_Whole(weight.shape, processes).with_rows(rows), requires_grad=False)

    _replace(model, in_parts)


def keep_rows(weight: nn.Parameter, processes: DeviceMesh) -> None:
    """Drop all but this process's rows of a weight, in place."""
    setattr(weight, _NAME, _Whole(weight.shape, processes))
    weight.data = _plain(weight)[_own_rows(weight, processes)].clone()


def hold_rows(model: nn.Module, processes: DeviceMesh) -> None:
    """Hold the weights that were read by `cut` as plain ones of this process's rows, in place."""

    def plain(weight: Any) -> nn.Parameter:
        if not hasattr(weight, "to_local"):
            return weight
        rows = nn.Parameter(weight.to_local(), requires_grad=False)
        setattr(rows, _NAME, _Whole(weight.shape, processes))
        return rows

    _replace(model, plain)


def hold_whole(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Gather the weights of some modules of a model, in place; tied ones stay tied.

    All processes make the call together. Weights that are whole stay as they are.
    """
    wanted = {weight for module in modules for weight in module.parameters() if hasattr(weight, _NAME)}

    def gathered(weight: nn.Parameter) -> nn.Parameter:
        if weight not in wanted:
            return weight
        part: _Whole = getattr(weight, _NAME)
        return nn.Parameter(part.with_rows(_plain(weight)).full_tensor(), requires_grad=False)

    if wanted:
        _replace(model, gathered)


@contextmanager
def known_by_shape(model: nn.Module) -> Iterator[None]:
    """Inside it, weights of which this process has some rows are whole ones without memory, which FSDP divides; after
    it their parts are those rows."""
    kept: dict[nn.Parameter, nn.Parameter] = {}

    def by_shape(weight: nn.Parameter) -> nn.Parameter:
        part: _Whole | None = getattr(weight, _NAME, None)
        if part is None:
            return weight
        whole = nn.Parameter(torch.empty(part.shape, dtype=weight.dtype, device="meta"), requires_grad=False)
        kept[whole] = weight
        return whole

    _replace(model, by_shape)
    places = {
        (module, name): kept[weight]
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight in kept
    }
    yield
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for (module, name), weight in places.items():
        if weight not in filled:
            part: _Whole = getattr(weight, _NAME)
            filled[weight] = nn.Parameter(part.with_rows(_plain(weight)), requires_grad=False)
        module._parameters[name] = filled[weight]


def _own_rows(weight: torch.Tensor, processes: DeviceMesh) -> slice:
    """This process's rows, as FSDP cuts them: equal parts, the last ones shorter or empty."""
    height = -(-len(weight) // processes.size())
    first = min(processes.get_local_rank() * height, len(weight))
    return slice(first, first + height)


def _plain(weight: nn.Parameter) -> torch.Tensor:
    """A weight's memory, not as bitsandbytes' kind of tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.data.as_subclass(torch.Tensor)


def _submodule_weights(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    module = getattr(model, name, None)
    if isinstance(module, nn.Module):
        yield from module.parameters()


def _replace(model: nn.Module, replacement: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put other parameters in the place of a model's, in place; tied ones, which are one parameter, stay so."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if weight not in replaced:
                    replaced[weight] = replacement(weight)
                module._parameters[name] = replaced[weight]
