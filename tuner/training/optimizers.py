"""The optimizer, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tuner.config.training import AdamW
from tuner.models.quantization import optimizer_class


@dataclass(frozen=True)
class Trained:
    """A set of weights with one learning rate, whose gradients are clipped together."""

    parameters: Mapping[str, torch.nn.Parameter]
    """By name, in a fixed order."""
    lr: float
    """Peak learning rate."""
    start: int = 0
    """Step (0-based) from which they are trained, and with which their schedule begins."""


def make_optimizer(config: AdamW, *trained: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over sets of named parameters, in their order: matrices with weight decay, vectors without.

    Each set has parameter groups of its own, whose "set" is its index.
    """
    groups: list[dict[str, Any]] = []
    for index, parameters in enumerate(trained):
        matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
        # norms and biases: decay would pull gains towards 0
        vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
        groups.append({"params": matrices, "weight_decay": config.weight_decay, "set": index})
        if vectors:
            groups.append({"params": vectors, "weight_decay": 0.0, "set": index})
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    optimizer = optimizer_class(config.bits, config.paged)
    if optimizer is torch.optim.AdamW:
        settings["fused"] = True
    return optimizer(groups, **settings)
