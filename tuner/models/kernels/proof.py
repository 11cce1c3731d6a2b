"""Proof on a loaded model that a kernel computes what the plain model does, but for rounding.

Compared are the last hidden states of packed rows, with and without gradients, and the gradients of the weights that
are trained, each with those of the same model in a higher precision: fp32 where products are in bf16, else fp64. A
kernel rounds elsewhere, so its error is another one, and of the plain path's size.
Shapes: T tokens of a row, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tuner.data.batch import Batch
from tuner.models.arithmetic import product_precision
from tuner.models.forward import hidden_states
from tuner.models.freeze import plain_name
from tuner.models.kernels.exact import computed_in
from tuner.models.load import Loaded
from tuner.models.probe import random_row

ROWS = ((33, 1, 94), (57,))
"""Tokens of the segments of each row: two rows, as a kernel may be made for the first one's shape."""
FLOOR = 1e-5
"""Relative error that is always allowed: that of some hundred roundings in fp32."""
FACTOR = 2.0
"""Largest error of a kernel, in units of the plain path's."""
SAMPLE = 2**16
"""Elements of a weight's gradient that are compared; of larger ones every n-th."""

Measures = dict[str, list[Tensor]]
"""By what is compared, its tensors over layers and rows."""


def bound(plain: float) -> float:
    """The largest relative error of a kernel, where the plain path's is this."""
    return max(FLOOR, FACTOR * plain)


class Proof:
    """What a model computes before a kernel is installed, to be compared with what it computes after.

    The model is whole in this process, and its layers not yet checkpointed. It is left in eval mode, as it was loaded.
    """

    def __init__(self, loaded: Loaded, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.model, self._autocast = loaded.model, autocast
        device = next(self.model.parameters()).device
        self._rows = [random_row(self.model, device, lengths) for lengths in ROWS]
        in_bf16 = product_precision(device, loaded.precision) == "bf16"
        higher = torch.float32 if in_bf16 else torch.float64
        self._exact = self._measure(lambda: computed_in(higher, self.model))
        self._plain = self._measure(autocast)

    def fault(self) -> str | None:
        """What the model with the kernel computes otherwise, as the rest of a sentence; None where it is proved."""
        for name, (error, plain) in self.errors().items():
            if not error <= bound(plain):  # NaN fails, too
                return f"is off by {error:.1e} in {name}, where the plain path is by {plain:.1e}"
        return None

    def errors(self) -> dict[str, tuple[float, float]]:
        """What is compared -> the relative error of the model as it is now, and of the plain model."""
        kernel = self._measure(self._autocast)
        return {
            name: (_relative_error(kernel[name], exact), _relative_error(self._plain[name], exact))
            for name, exact in self._exact.items()
        }

    def _measure(self, precision: Callable[[], AbstractContextManager[Any]]) -> Measures:
        measures: Measures = {}
        with _trained_without_chance(self.model):
            for row in self._rows:
                for name, value in _learned(self.model, row, precision):
                    measures.setdefault(name, []).append(value)
        self.model.eval()
        with torch.no_grad(), precision():
            measures["states without gradients"] = [hidden_states(self.model, row) for row in self._rows]
        return measures


@contextmanager
def _trained_without_chance(model: nn.Module) -> Generator[None]:
    """In training mode without dropout, and with adapters that take part: one of whose factors is zero at first."""
    training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    zeros = [weight for weight in model.parameters() if weight.requires_grad and not weight.any()]
    generator = torch.Generator().manual_seed(
        0
    )  # of its own: a draw from the global one would change the run's dropout
    with torch.no_grad():
        for weight in zeros:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in zeros:
                weight.zero_()
        model.train(training)


def _learned(
    model: nn.Module, row: Batch, precision: Callable[[], AbstractContextManager[Any]]
) -> Iterator[tuple[str, Tensor]]:
    """Hidden states of a training pass, and the trained weights' gradients of a sum over them, by kinds of weights.

    A kind are the weights of a name in all layers: a kernel is wrong in all alike, and rounding's share of so many
    numbers is steady.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.set_grad_enabled(bool(trained)), precision():
        states_TD = hidden_states(model, row)
    yield "states", states_TD.detach()
    if not trained:
        return
    generator = torch.Generator().manual_seed(1)
    direction_TD = torch.randn(states_TD.shape, generator=generator).to(states_TD.device)
    # not used: heads, and adapters of other roles
    gradients = torch.autograd.grad(
        (states_TD * direction_TD).sum(), list(trained.values()), allow_unused=True
    )
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            yield f"the gradient of {re.sub(r'[.][0-9]+[.]', '.*.', plain_name(name))}", _sample(gradient)


def _sample(gradient: Tensor) -> Tensor:
    flat = gradient.flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)].float()


def _relative_error(values: list[Tensor], exact: list[Tensor]) -> float:
    """By the norm of all of them together."""
    pairs = list(zip(values, exact, strict=True))
    difference = sum(float((value - right).double().square().sum()) for value, right in pairs)
    norm = sum(float(right.double().square().sum()) for _, right in pairs)
    return (difference / norm) ** 0.5 if norm else (0.0 if difference == 0 else float("inf"))
