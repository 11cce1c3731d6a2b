"""Roles of a stage: policy, reference, critic, reward model. Several may be adapters and heads on one base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tuner.models.adapters import ADAPTER, activate, belongs_to
from tuner.models.load import Loaded
from tuner.models.sharding import whole
from tuner.models.unwrap import unwrapped


class ScalarHead(torch.nn.Module):
    """A role's own head on a base that other roles share: from a hidden state [.., D] to one number."""

    def __init__(self, weight_1D: torch.Tensor, *, trained: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight_1D.detach().float().clone(), requires_grad=trained)

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden_ND, self.weight)


@dataclass(frozen=True)
class Role:
    """One use of a model: with one of its adapters, and perhaps a head of its own."""

    loaded: Loaded
    adapter: str | None = ADAPTER
    """The adapter that is active; None: none. Ignored for a model without adapters."""
    head: ScalarHead | None = None
    """The role's own head; None: the model's."""

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """This role's trained weights by name, in the model's order, without the model's head where it has its own."""
        unused = set()
        if self.head is not None:
            # a set: `in` on a list would compare tensors by their values
            unused = set(unwrapped(self.loaded.model).get_output_embeddings().parameters())
        named = {
            name: parameter
            for name, parameter in self.loaded.model.named_parameters()
            if parameter.requires_grad and belongs_to(name, self.adapter) and parameter not in unused
        }
        if self.head is not None and self.head.weight.requires_grad:
            named["score.weight"] = self.head.weight
        return named


class _WithHead(torch.nn.Module):
    """A shared base under a role's own head."""

    def __init__(self, model: torch.nn.Module, score: ScalarHead) -> None:
        super().__init__()
        self.model, self.score = model, score
        self.config = unwrapped(model).config

    def get_decoder(self) -> torch.nn.Module:
        return unwrapped(self.model).get_decoder()

    @property
    def run_pass(self) -> Any:
        """The base's, where that is in shards; see `gathered`."""
        return unwrapped(self.model).run_pass

    @property
    def row_processes(self) -> Any:
        """The base's, where several compute its rows; see `RowPart`."""
        return unwrapped(self.model).row_processes


class Roles:
    """The roles of a stage, one open at a time. The first is the one the stage trains and saves."""

    def __init__(
        self, roles: Mapping[str, Role], autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._roles, self._autocast = dict(roles), autocast
        self._open: str | None = None
        users: dict[int, int] = {}
        for role in roles.values():
            users[id(role.loaded.model)] = users.get(id(role.loaded.model), 0) + 1
        self._shared = {model for model, count in users.items() if count > 1}
        self._views = {
            name: role.loaded.model if role.head is None else _WithHead(role.loaded.model, role.head)
            for name, role in roles.items()
        }

    @classmethod
    def of(cls, name: str, loaded: Loaded, autocast: Callable[[], AbstractContextManager[Any]]) -> Roles:
        """A single model in a single role."""
        return cls({name: Role(loaded)}, autocast)

    @property
    def loaded(self) -> Loaded:
        """The model of the first role: what the stage trains and saves."""
        return next(iter(self._roles.values())).loaded

    @property
    def models(self) -> list[Loaded]:
        """Every distinct model, in the order of the roles."""
        return list({id(role.loaded.model): role.loaded for role in self._roles.values()}.values())

    @property
    def notes(self) -> list[str]:
        """What the models' training changes or leaves out; see Loaded.notes."""
        return list(dict.fromkeys(note for loaded in self.models for note in loaded.notes))

    @property
    def heads(self) -> list[ScalarHead]:
        """The roles' own heads."""
        return [role.head for role in self._roles.values() if role.head is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def __contains__(self, name: str) -> bool:
        return name in self._roles

    def __getitem__(self, name: str) -> Role:
        if name not in self._roles:
            raise ValueError(f"no role {name!r} here; there are: {', '.join(self._roles)}")
        return self._roles[name]

    def trained(self, name: str | None = None) -> dict[str, torch.nn.Parameter]:
        """A role's trained weights by name, in the model's order; by default the first role's."""
        return self[name or next(iter(self._roles))].trained()

    def whole(self, name: str) -> AbstractContextManager[None]:
        """Hold the model of a role whole meanwhile, also where processes share it; all enter and leave together."""
        return whole(self[name].loaded.model)

    @contextmanager
    def role(self, name: str, *, train: bool = False) -> Iterator[torch.nn.Module]:
        """The model in a role, in training or evaluation mode, in the run's precision.

        A role must stay open until its backward pass is done: with gradient checkpointing that pass computes the
        layers again, under the adapter that is active then. Opening a second role meanwhile raises RuntimeError.
        """
        if self._open is not None:
            raise RuntimeError(f"role {self._open!r} is still open: close it before asking for {name!r}")
        role = self[name]
        model = role.loaded.model
        self._open = name
        if id(model) in self._shared:
            activate(model, role.adapter)
        if model.training != train:  # walking all modules takes longer than a small model's forward pass
            model.train(train)
        try:
            # Leaving autocast drops its cache of cast weights: opened once per pass, a role casts all its fp32 weights
            # again in each. With gradient checkpointing on a GPU it does so even where it stays open: layers are
            # computed again in autograd's thread, whose own autocast ends with each and drops what all threads share.
            with self._autocast(), torch.set_grad_enabled(train):
                yield self._views[name]
        finally:
            self._open = None
