"""From peft's wrapper to the model inside."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> Any:
    """transformers' model, without peft's wrapper; adapters inside it stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
