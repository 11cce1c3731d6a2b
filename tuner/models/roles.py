"""Roles: what the models of a stage are asked for. One base, many roles; a stage so far has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from tuner.models.load import Loaded


class Roles:
    """The roles of a stage on one loaded model, one open at a time."""

    def __init__(
        self, name: str, loaded: Loaded, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.name, self.loaded = name, loaded
        self._autocast = autocast
        self._open: str | None = None

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The weights that are trained, by name, in the model's order."""
        named = self.loaded.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    @contextmanager
    def role(self, name: str, *, train: bool = False) -> Iterator[torch.nn.Module]:
        """The model in a role, in training or evaluation mode, in the run's precision.

        A role stays open over its backward pass: switching adapters in between would leave the trained one
        without gradients, so asking for another meanwhile raises RuntimeError.
        """
        if self._open is not None:
            raise RuntimeError(f"role {self._open!r} is still open: close it before asking for {name!r}")
        if name != self.name:
            raise ValueError(f"no role {name!r} here; there is: {self.name}")
        model = self.loaded.model
        self._open = name
        if model.training != train:  # walking all modules costs a small model more than it computes
            model.train(train)
        try:
            with self._autocast(), torch.set_grad_enabled(train):
                yield model
        finally:
            self._open = None
