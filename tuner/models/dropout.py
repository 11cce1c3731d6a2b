"""Dropout that a model's own configuration sets, as against that of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def switch_off_dropout(model: nn.Module) -> None:
    """No dropout in training mode either: the ratio of two passes must depend on the weights alone."""
    for owner, name in _rates(model, lambda path, kind: True):
        setattr(owner, name, 0.0)


def switch_off_attention_dropout(model: nn.Module) -> float:
    """Set dropout of attention weights to 0, which packed rows do not have; returns the largest that was set."""
    largest = 0.0
    for owner, name in _rates(model, _drops_attention):
        largest = max(largest, getattr(owner, name))
        setattr(owner, name, 0.0)
    return largest


def _rates(model: nn.Module, wanted: Callable[[str, str], bool]) -> Iterator[tuple[Any, str]]:
    """Object and attribute of every rate above 0: of nn.Dropout, and of modules that hold the number itself.

    wanted: called with the path of the rate and the class of the module that it stands in.
    """
    for path, module in model.named_modules():
        for name, child in (*module.named_children(), ("", None)):
            if isinstance(child, nn.Dropout) and child.p and wanted(f"{path}.{name}", type(module).__name__):
                yield child, "p"
        for name, value in list(vars(module).items()):
            is_rate = isinstance(value, float) and "drop" in name and value > 0
            if is_rate and wanted(f"{path}.{name}", type(module).__name__):
                yield module, name


def _drops_attention(path: str, kind: str) -> bool:
    """Whether a rate is that of attention weights: by its own name, or as a plain number of an attention module."""
    name = path.rpartition(".")[2]
    return "att" in name or (
        "Attention" in kind and name in ("dropout", "dropout_p", "dropout_prob", "attn_drop")
    )
