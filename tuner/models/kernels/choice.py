"""Which kernels a run's models are computed by: those that its config names, or all that are proved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from tuner.config import TrainingConfig
from tuner.config.training import EXCLUDED_BY, KernelName
from tuner.errors import UserError
from tuner.models.device_errors import is_memory_full
from tuner.models.folder_files import first_line
from tuner.models.kernels.proof import Proof
from tuner.models.kernels.registry import KERNELS, Kernel
from tuner.models.load import Loaded


@dataclass(frozen=True)
class Choice:
    """The kernels of a run."""

    names: tuple[KernelName, ...]
    left_out: dict[str, str]
    """Kernel -> why, as the rest of a sentence about it."""

    def __str__(self) -> str:
        others = "; ".join(f"{name} {reason}" for name, reason in self.left_out.items())
        return f"kernels: {', '.join(self.names) or 'plain'}" + (f" (left out: {others})" if others else "")


def install_kernels(
    models: Sequence[Loaded],
    config: TrainingConfig,
    wanted: Sequence[KernelName] | None,
    autocast: Callable[[], AbstractContextManager[Any]],
    agreed: Callable[[str | None], str | None] = lambda reason: reason,
) -> Choice:
    """Install kernels in models whose layers are not yet checkpointed or tiled, each once it is proved on all of them.

    wanted: None: those that are there, in the registry's order. agreed: from this process's reason against a kernel to
    that of any process, which all ask together. Raises UserError where one that is wanted cannot be had, or is wrong.
    """
    device = next(models[0].model.parameters()).device
    left_out: dict[str, str] = {}
    names: list[KernelName] = []
    proofs: list[Proof] = []
    for name in KERNELS if wanted is None else wanted:
        reason = _exclusion(name, names) if wanted is None else None
        reason = reason or config.kernel_conflict(name) or agreed(KERNELS[name].unavailable(device))
        if reason is None:
            # of the plain models, before the first kernel is installed
            proofs = proofs or [Proof(loaded, autocast) for loaded in models]
            reason = agreed(_install(KERNELS[name], proofs))
        if reason is None:
            names.append(name)
        elif wanted is None:
            left_out[name] = reason
        else:
            raise UserError(
                f'kernels: "{name}" {reason}; leave it out, or write kernels="auto" for what is proved here'
            )
    return Choice(tuple(names), left_out)


def _exclusion(name: KernelName, names: Sequence[KernelName]) -> str | None:
    other = EXCLUDED_BY.get(name)
    return f"excludes {other}" if other in names else None


def _install(kernel: Kernel, proofs: Sequence[Proof]) -> str | None:
    """Install a kernel in all models, or in none; returns why it is in none."""
    before = [_Parts(proof.model) for proof in proofs]
    try:
        replaced = sum(kernel.install(proof.model) for proof in proofs)
        reason = None if replaced else "has nothing to replace in this model"
        reason = reason or next((fault for proof in proofs if (fault := proof.fault())), None)
    except Exception as error:  # a compiler's or a driver's may be of any class
        if is_memory_full(error):
            raise
        reason = f"fails here ({first_line(error)})"
    if reason is not None:
        for parts in before:
            parts.restore()
    return reason


class _Parts:
    """The modules of a model as they are: their classes, attributes, and the modules within them."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = [
            (module, type(module), dict(vars(module)), dict(module._modules)) for module in model.modules()
        ]

    def restore(self) -> None:
        for module, kind, attributes, children in self._parts:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
