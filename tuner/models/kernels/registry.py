"""Kernels by their names in a config. A kernel is a module of this folder with two functions, and an entry here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from tuner.config.training import KernelName
from tuner.models.kernels import compiled, liger, lora


class Kernel(Protocol):
    """What takes the place of parts of a model."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot be had here, as the rest of a sentence about it; None where it can, or only trying tells."""
        ...

    def install(self, model: nn.Module) -> int:
        """Replace parts of a model, in place; returns how many.

        A part is replaced where the model's own formula is the kernel's, told by its code. It changes classes and
        attributes of modules, and which modules they hold, so that it can be taken back; names and weights stay.
        """
        ...


KERNELS: Mapping[KernelName, Kernel] = {"compile": compiled, "liger": liger, "lora": lora}
"""In the order in which `kernels="auto"` tries them."""
