"""Optimisers from their config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tuner.config import AdamW
from tuner.models.quantization import optimizer_class


def make_optimizer(config: AdamW, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over named parameters, in their order: matrices with weight decay, vectors without."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": config.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    kind = optimizer_class(config.bits, config.paged)
    if kind is torch.optim.AdamW:
        settings["fused"] = True
    return kind(groups, **settings)
