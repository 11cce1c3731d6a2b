"""The MLP of a layer for some tokens of a row at a time (ALST's tiled MLP, Bekman et al., arXiv 2506.13996).

An MLP computes each token by itself, so it can be computed tile by tile, and what it holds inside is that of one tile:
its input is kept whole, and the backward pass computes each tile again before it goes through it. Gradients of weights
are sums over tokens; they are added up tile by tile. Products of other rows of a matrix are rounded otherwise, so
results are those without tiles up to rounding. Passes without gradients are tiled, too: PPO compares both.

Shapes: T tokens of the row, D hidden size, C tokens of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tuner.errors import UserError
from tuner.models.adapter_kinds import LINEAR
from tuner.models.freeze import decoder_layers
from tuner.models.kept_products import no_products


def tile_mlps(model: nn.Module, tokens: int | None) -> None:
    """Compute the MLPs of a model's layers for so many tokens at a time, in place; None: for all.

    The model may be on the meta device. Raises UserError where a layer has no MLP of its own, or a mixture of experts.
    """
    if tokens is None:
        return
    for layer in decoder_layers(model)[1]:
        mlp = mlp_of(layer)
        mlp.forward = functools.partial(_forward, mlp, mlp.forward, tokens)


def refuse_tiles(model: nn.Module) -> None:
    """Raise UserError where `tile_mlps` does."""
    for layer in decoder_layers(model)[1]:
        mlp_of(layer)


def mlp_of(layer: nn.Module) -> nn.Module:
    """The MLP of a layer; raises UserError as `tile_mlps` does."""
    parts = [part for part in layer.children() if any(weight.ndim > 1 for weight in part.parameters())]
    mlp = parts[-1]
    if any(isinstance(module, nn.ModuleList) for module in mlp.modules()) or any(
        weight.ndim > 2 for weight in mlp.parameters()
    ):
        what = "mixtures of experts, which take tokens by their router"
    elif len(parts) < 2 or isinstance(mlp, LINEAR) or len(signature(mlp.forward).parameters) > 1:
        what = "no MLP that takes hidden states alone"
    else:
        return mlp
    raise UserError(
        f"mlp_tile: the layers of this model ({type(layer).__name__}) have {what}; leave mlp_tile out"
    )


def _forward(mlp: nn.Module, forward: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor) -> Tensor:
    """In place of the MLP's own forward pass: [..., D] -> [..., D]."""
    hidden_1TD = hidden.reshape(1, -1, hidden.shape[-1])
    if hidden_1TD.shape[1] <= tokens:
        return forward(hidden)
    weights = _trained(mlp)
    tiles = _Tiles(mlp, forward, tokens, _autocast(hidden.device))
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weights):
        return tiles.computed(hidden_1TD).view(hidden.shape)
    # the second tensor: with trained weights alone, as in the lowest layer, there must be a graph, too
    start = torch.empty(0, device=hidden.device, requires_grad=True)
    kept_1TD = _Input.apply(hidden_1TD, start)
    return _Tiled.apply(kept_1TD, kept_1TD.grad_fn, tiles, hidden.requires_grad, *weights).view(hidden.shape)


def _trained(mlp: nn.Module) -> list[nn.Parameter]:
    """Asked in each pass: FSDP puts gathered weights in the place of a process's rows."""
    return [weight for weight in mlp.parameters() if weight.requires_grad]


class _Input(torch.autograd.Function):
    """Keeps the MLP's input for `_Tiled`.

    A node of its own, as autograd keeps the input of a node after the node is computed: where a layer's other values
    are computed again, this input is the last of them, and checkpointing stops before the MLP.
    """

    @staticmethod
    def forward(ctx: Any, hidden_1TD: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_1TD)
        return hidden_1TD.view_as(hidden_1TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Tiled(torch.autograd.Function):
    """An MLP, tile by tile, and its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, kept_1TD: Tensor, node: Any, tiles: _Tiles, wants_input: bool, *weights: Tensor
    ) -> Tensor:
        ctx.node, ctx.tiles, ctx.wants_input = node, tiles, wants_input
        ctx.random_state = _RandomState(kept_1TD.device)
        return tiles.computed(kept_1TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # type: ignore[override]
        (hidden_1TD,) = ctx.node.saved_tensors
        with ctx.random_state.again():
            gradient_1TD, of_weights = ctx.tiles.gradients(hidden_1TD, upstream[0], ctx.wants_input)
        return gradient_1TD, None, None, None, *of_weights


class _Tiles:
    """An MLP's two passes over a row."""

    def __init__(
        self,
        mlp: nn.Module,
        forward: Callable[[Tensor], Tensor],
        tokens: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._mlp, self._forward, self._tokens, self._autocast = mlp, forward, tokens, autocast

    @torch.no_grad()
    def computed(self, hidden_1TD: Tensor) -> Tensor:
        """What the MLP makes of the row."""
        result_1TD: Tensor | None = None
        with self._autocast(), no_products():  # a tile's are computed again with the tile
            for place, tile_1CD in self._cut(hidden_1TD):
                part_1CD = self._forward(tile_1CD)
                if result_1TD is None:
                    result_1TD = part_1CD.new_empty(1, hidden_1TD.shape[1], part_1CD.shape[-1])
                result_1TD[:, place] = part_1CD
        assert result_1TD is not None
        return result_1TD

    def gradients(
        self, hidden_1TD: Tensor, upstream_1TD: Tensor, wants_input: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of the input, if it is wanted, and of the trained weights in their order."""
        weights = _trained(self._mlp)
        gradient_1TD = torch.empty_like(hidden_1TD) if wants_input else None
        sums: list[Tensor | None] = [None] * len(weights)
        for place, part_1CD in self._cut(hidden_1TD):
            tile_1CD = part_1CD.detach().requires_grad_(wants_input)
            with torch.enable_grad(), self._autocast():
                result_1CD = self._forward(tile_1CD)
            inputs = [*([tile_1CD] if wants_input else []), *weights]
            # not used: adapters of the other roles
            of_tile = list(torch.autograd.grad(result_1CD, inputs, upstream_1TD[:, place], allow_unused=True))
            if gradient_1TD is not None:
                gradient_1TD[:, place] = of_tile.pop(0)
            sums = [
                gradient if total is None else total.add_(gradient)
                for total, gradient in zip(sums, of_tile, strict=True)
            ]
        return gradient_1TD, sums

    def _cut(self, hidden_1TD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, hidden_1TD.shape[1], self._tokens):
            place = slice(start, start + self._tokens)
            yield place, hidden_1TD[:, place]


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What is cast now, for any time and thread; without autocast's store of cast weights: casts that are made without
    gradients would be taken from it where gradients are needed, and weights silently get none."""
    return functools.partial(
        torch.autocast,
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )


class _RandomState:
    """What dropout is drawn from, as it is now."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._host = torch.get_rng_state()
        self._of_device = [torch.cuda.get_rng_state(own) for own in self._devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw inside as from now on; after it, as if nothing had been drawn."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._host)
            for own, state in zip(self._devices, self._of_device, strict=True):
                torch.cuda.set_rng_state(state, own)
            yield
