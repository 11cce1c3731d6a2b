"""The way out of peft's wrapping."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> Any:
    """transformers' model itself, without an adapter's wrapping; adapters inside it stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
