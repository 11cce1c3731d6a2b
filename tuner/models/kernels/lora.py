"""LoRA's linear layers with a backward pass written out, one for all layers of a block that share an input.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T

    d_i = s_i g_i B_i        dA_i = d_i^T x        dB_i = s_i g_i^T (x A_i^T)
    dx  = sum_i g_i W_i + [d_1 .. d_n] [A_1; ..; A_n]

g_i is the gradient of y_i. Only x and x A^T wait for the backward pass. Sums run inside the products (`addmm_`, with
s_i as its factor), so no [T, D] or [T, O] value is made to be scaled, cast or added. A weight in 4 bit is de-quantized
once in each direction. Under autocast x is cast once for all layers that share it. That peft's layers leave this on
the table, and that their backward pass can be written by hand, is Unsloth's idea (unslothai/unsloth,
kernels/fast_lora.py); the code is from the formulas.

peft's own forward pass remains for what the formulas leave out, and its modules and weights stay as they are.

Shapes: T tokens, D width of the input, O width of a layer's result, r rank of an adapter, R sum of the layers' ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tuner.models.adapter_kinds import lora_linears
from tuner.models.kept_products import kept
from tuner.models.quantization import is_in_4_bit, product_in_4_bit, weight_from_4_bit

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers of a block that are called with the same tensor, in most families of transformers. Others
are computed by themselves; so is a layer of these that is called with a tensor of its own."""


def unavailable(device: torch.device) -> str | None:
    """Why adapters cannot be fused on a device; None where they can."""
    if device.type in ("cpu", "cuda"):
        return None
    return f"fused LoRA layers are written for CUDA and CPU, and not for {device.type}"


def install(model: nn.Module) -> int:
    """Have the LoRA layers of a model compute as this module's docstring says, in place; returns how many.

    Left as they are: layers on 8-bit or other weights than linear layers', and those whose forward pass has been
    replaced already. A layer decides in each pass whether its state permits it: an active adapter, not merged,
    without dropout, variants such as DoRA, or a bias of its own.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Any]] = {}
    for path, layer in lora_linears(model):
        if "forward" not in vars(layer):
            parent, _, name = path.rpartition(".")
            names = next((names for names in SHARED_INPUT if name in names), (name,))
            groups.setdefault((parent, names), []).append(layer)
    for layers in groups.values():
        group = _Group(layers)
        for layer in layers:
            layer.forward = functools.partial(_forward, group, layer, layer.forward)
    return sum(map(len, groups.values()))


def _forward(
    group: _Group, layer: Any, plain: Callable[..., Tensor], x: Tensor, *further: Any, **settings: Any
) -> Tensor:
    """In place of a layer's own forward pass, `plain`: [.., D] -> [.., O]."""
    own = None if further or settings else _Projection.of(layer, x)
    return plain(x, *further, **settings) if own is None else group.result(own, x)


class _Group:
    """Layers that share an input. The first that is called computes all; each of the others then takes its result."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._waiting: _Waiting | None = None

    def result(self, own: _Projection, x: Tensor) -> Tensor:
        result = None if self._waiting is None else self._waiting.take(own, x)
        if result is not None:
            if not self._waiting:
                self._waiting = None  # which holds the input
            return result
        self._waiting = None
        others = (_Projection.of(layer, x) for layer in self._layers if layer.base_layer is not own.base)
        projections = [own, *(other for other in others if other is not None and other.dtype == own.dtype)]
        result, *results = _project(projections, x)
        if results:
            self._waiting = _Waiting(x, projections[1:], results)
        return result


class _Waiting:
    """Results for an input that the layers they belong to have not been called for yet."""

    def __init__(self, x: Tensor, projections: list[_Projection], results: list[Tensor]) -> None:
        self._x, self._pass = x, _pass_of(x)
        # the projections are kept for their weights, by whose identity a result is told
        self._results = {own.state(): (own, result) for own, result in zip(projections, results, strict=True)}

    def take(self, own: _Projection, x: Tensor) -> Tensor | None:
        """A layer's result for an input, once; None where there is none of this input, pass and weights."""
        if x is not self._x or _pass_of(x) != self._pass:
            return None
        return self._results.pop(own.state(), (None, None))[1]

    def __bool__(self) -> bool:
        return bool(self._results)


def _pass_of(x: Tensor) -> tuple[bool, int]:
    """What may change between two calls with the same tensor."""
    return torch.is_grad_enabled(), 0 if x.is_inference() else x._version


@dataclass(frozen=True, eq=False)
class _Projection:
    """A layer with its active adapter, as it is in a pass."""

    base: Any
    a_rD: nn.Parameter
    b_Or: nn.Parameter
    scale: float
    dtype: torch.dtype
    """Of its products."""
    result_dtype: torch.dtype

    @classmethod
    def of(cls, layer: Any, x: Tensor) -> _Projection | None:
        """None where peft's own forward pass must run."""
        if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
            return None
        base, name = layer.base_layer, layer.active_adapters[0]
        if name not in layer.lora_A or name in layer.lora_variant:
            return None
        first, second, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if (dropout.training and getattr(dropout, "p", 0.0) > 0) or not _are_plain(first, second):
            return None
        dtype = _product_dtype(x, base, first.weight, second.weight)
        if dtype is None or not _is_frozen(base):
            return None
        result_dtype = x.dtype if is_in_4_bit(base) else dtype  # as bitsandbytes has it
        return cls(base, first.weight, second.weight, layer.scaling[name], dtype, result_dtype)

    def state(self) -> tuple[Any, ...]:
        """What its result for an input depends on."""
        weights = (self.a_rD, self.b_Or)
        return id(self.base), self.scale, self.dtype, *((id(weight), weight._version) for weight in weights)

    def product(self, rows_TD: Tensor) -> Tensor:
        """x W^T + b, a tensor of its own: [T, D] -> [T, O]."""
        if is_in_4_bit(self.base):
            return product_in_4_bit(self.base, rows_TD)
        weight_DO, bias_O = self.base.weight.to(self.dtype).t(), self.base.bias
        if bias_O is None:
            return torch.mm(rows_TD, weight_DO)
        return torch.addmm(bias_O.to(self.dtype), rows_TD, weight_DO)

    def weight(self) -> Tensor:
        """[O, D]"""
        if is_in_4_bit(self.base):
            return weight_from_4_bit(self.base, self.dtype)
        return self.base.weight.to(self.dtype)


def _are_plain(*factors: Any) -> bool:
    return all(
        type(factor) is nn.Linear and factor.bias is None and not _is_hooked(factor) for factor in factors
    )


def _is_frozen(base: Any) -> bool:
    return not (
        base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad) or _is_hooked(base)
    )


def _is_hooked(module: nn.Module) -> bool:
    """Whether someone is to be told of a module's passes, of which there would be none."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _product_dtype(x: Tensor, base: Any, a_rD: Tensor, b_Or: Tensor) -> torch.dtype | None:
    """The dtype in which all of a layer's products are computed; None where it is not one."""
    kind = x.device.type
    is_cast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_cast else x.dtype
    dtypes = {x.dtype, a_rD.dtype, b_Or.dtype}
    if is_in_4_bit(base):
        state = base.weight.quant_state
        if base.compute_dtype != dtype or getattr(state, "packing_format_for_cpu", False):
            return None
    elif type(base) is nn.Linear:
        dtypes.add(base.weight.dtype)
    else:
        return None
    # autocast leaves fp64 as it is
    fits = dtypes <= {torch.float32, torch.bfloat16, torch.float16} if is_cast else dtypes == {dtype}
    return dtype if fits else None


def _project(projections: list[_Projection], x: Tensor) -> tuple[Tensor, ...]:
    """Results [.., O] of each projection for one input [.., D]."""
    factors = [weight for own in projections for weight in (own.a_rD, own.b_Or)]
    call = _Call(projections, x.shape[:-1], x.requires_grad)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (x, *factors)):
        rows_TD, inner_TR = call.entered(x)
        return call.results(rows_TD, inner_TR)
    rows_TD, inner_TR = _Entry.apply(call, x, *factors)
    return _Projections.apply(call, rows_TD.grad_fn, rows_TD, inner_TR, *factors)


class _Entry(torch.autograd.Function):
    """x A^T, and all that waits for the backward pass of `_Projections`.

    A node of its own, as autograd keeps what a node saves after the node is computed: where a layer's values are
    computed again and this is the last of them, as before a layer's last product, checkpointing stops before the
    product.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
        rows_TD, inner_TR = call.entered(x)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype, ctx.num_factors = x.shape, x.dtype, len(factors)
        trains_a, trains_b = (any(weight.requires_grad for weight in factors[first::2]) for first in (0, 1))
        # the factors: autograd then notices when they are changed before the backward pass
        ctx.save_for_backward(rows_TD if trains_a else None, inner_TR if trains_b else None, *factors)
        inner_TR = inner_TR.detach()
        ctx.mark_non_differentiable(inner_TR)
        return rows_TD.view_as(rows_TD), inner_TR

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        gradient = None if grads[0] is None else grads[0].view(ctx.shape).to(ctx.dtype)
        return None, gradient, *[None] * ctx.num_factors


class _Projections(torch.autograd.Function):
    """Results of the layers that share an input; it saves nothing itself."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, entry: Any, rows_TD: Tensor, inner_TR: Tensor, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.entry = call, entry
        ctx.set_materialize_grads(False)
        return call.results(rows_TD, inner_TR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:  # type: ignore[override]
        rows_TD, inner_TR, *factors = ctx.entry.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        of_rows, of_factors = ctx.call.gradients(rows_TD, inner_TR, factors, upstream, wanted)
        return None, None, of_rows, None, *of_factors


class _Call:
    """The two passes of layers that share an input."""

    def __init__(self, projections: list[_Projection], shape: torch.Size, wants_input: bool) -> None:
        self._projections, self._shape, self._wants_input = projections, shape, wants_input
        self._dtype = projections[0].dtype
        self._places: list[slice] = []
        """Of each adapter among the R columns of x A^T."""
        start = 0
        for own in projections:
            self._places.append(slice(start, start := start + len(own.a_rD)))

    def entered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input as rows [T, D] in the dtype of products, and x A^T [T, R]."""
        rows_TD = x.reshape(-1, x.shape[-1]).to(self._dtype)
        stacked_RD = self._stacked([own.a_rD for own in self._projections])
        return rows_TD, kept(lambda: torch.mm(rows_TD, stacked_RD.t()))

    def results(self, rows_TD: Tensor, inner_TR: Tensor) -> tuple[Tensor, ...]:
        return kept(lambda: tuple(self._results(rows_TD, inner_TR)))

    def _results(self, rows_TD: Tensor, inner_TR: Tensor) -> list[Tensor]:
        results: list[Tensor] = []
        for own, place in zip(self._projections, self._places, strict=True):
            result_TO = own.product(rows_TD)
            result_TO.addmm_(inner_TR[:, place], own.b_Or.to(self._dtype).t(), alpha=own.scale)
            # no view: autograd would let nobody change it in place
            shaped = torch.ops.aten._unsafe_view(result_TO, (*self._shape, result_TO.shape[1]))
            results.append(shaped.to(own.result_dtype))
        return results

    def gradients(
        self,
        rows_TD: Tensor | None,
        inner_TR: Tensor | None,
        factors: Sequence[Tensor],
        upstream: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of the rows, where the input wants one, and of those factors that do.

        factors, wanted: A and B of each layer in turn. upstream: None for a result that nothing came of.
        """
        gradients_TO = [
            None if part is None else part.reshape(-1, part.shape[-1]).to(self._dtype) for part in upstream
        ]
        with torch.autocast(factors[0].device.type, enabled=False):
            of_b = self._of_b(gradients_TO, inner_TR, factors[1::2], wanted[1::2])
            of_rows, of_a = None, [None] * len(of_b)
            if self._wants_input or any(wanted[::2]):
                of_inner_TR = self._of_inner(gradients_TO, factors[1::2])
                of_a = self._of_a(of_inner_TR, rows_TD, factors[::2], wanted[::2])
                if self._wants_input:
                    of_rows = self._of_rows(gradients_TO, of_inner_TR, factors[::2])
        return of_rows, [gradient for pair in zip(of_a, of_b, strict=True) for gradient in pair]

    def _of_b(
        self,
        gradients_TO: list[Tensor | None],
        inner_TR: Tensor | None,
        b_Or: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        return [
            _scaled(gradient_TO.t(), inner_TR[:, place], own.scale).to(weight.dtype)
            if is_wanted and gradient_TO is not None and inner_TR is not None
            else None
            for own, place, gradient_TO, weight, is_wanted in zip(
                self._projections, self._places, gradients_TO, b_Or, wanted, strict=True
            )
        ]

    def _of_inner(self, gradients_TO: list[Tensor | None], b_Or: Sequence[Tensor]) -> Tensor:
        """[d_1 .. d_n], [T, R]."""
        parts_TO = [gradient_TO for gradient_TO in gradients_TO if gradient_TO is not None]
        result_TR = parts_TO[0].new_zeros(len(parts_TO[0]), self._places[-1].stop)
        for own, place, gradient_TO, weight in zip(
            self._projections, self._places, gradients_TO, b_Or, strict=True
        ):
            if gradient_TO is not None:
                result_TR[:, place].addmm_(gradient_TO, weight.to(self._dtype), beta=0, alpha=own.scale)
        return result_TR

    def _of_a(
        self,
        of_inner_TR: Tensor,
        rows_TD: Tensor | None,
        a_rD: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        if rows_TD is None:
            return [None] * len(a_rD)
        of_stacked_RD = torch.mm(of_inner_TR.t(), rows_TD)
        return [
            of_stacked_RD[place].to(weight.dtype) if is_wanted else None
            for place, weight, is_wanted in zip(self._places, a_rD, wanted, strict=True)
        ]

    def _of_rows(
        self, gradients_TO: list[Tensor | None], of_inner_TR: Tensor, a_rD: Sequence[Tensor]
    ) -> Tensor:
        result_TD = torch.mm(of_inner_TR, self._stacked(a_rD))
        for own, gradient_TO in zip(self._projections, gradients_TO, strict=True):
            if gradient_TO is not None:
                result_TD.addmm_(gradient_TO, own.weight())
        return result_TD

    def _stacked(self, a_rD: Sequence[Tensor]) -> Tensor:
        """[A_1; ..; A_n], [R, D], in the dtype of products."""
        if len(a_rD) == 1:
            return a_rD[0].to(self._dtype)
        stacked_RD = a_rD[0].new_empty(self._places[-1].stop, a_rD[0].shape[1], dtype=self._dtype)
        return torch.cat(tuple(a_rD), out=stacked_RD)


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left · right"""
    return left.new_empty(len(left), right.shape[1]).addmm_(left, right, beta=0, alpha=scale)
