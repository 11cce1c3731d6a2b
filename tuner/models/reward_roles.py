"""The roles of reward models: each an adapter and a head beside another model on its base, or a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tuner.config import Model
from tuner.errors import UserError
from tuner.models.adapter_kinds import has_score
from tuner.models.adapters import load_beside, load_reward_beside
from tuner.models.load import Loaded
from tuner.models.locate import Location
from tuner.models.roles import Role, ScalarHead

REWARD = "reward"
"""Role of the first reward model."""


def reward_role_names(count: int) -> list[str]:
    """Roles of so many reward models: reward, reward_2, reward_3, ...; on a shared base the names of their adapters."""
    return [REWARD, *(f"{REWARD}_{number}" for number in range(2, count + 1))][:count]


@dataclass(frozen=True)
class RewardPlace:
    """A reward model as a config names it, and where it is."""

    model: Model
    location: Location

    def check(self) -> None:
        """Raises UserError for a model without a scalar head."""
        if not self.location.has_score:
            raise UserError(
                f"{self.model.path}: this is no reward model: it has no scalar head; train one from it first"
            )


@dataclass(frozen=True)
class Host:
    """A model with an adapter, beside which others on its base can stand."""

    location: Location
    loaded: Loaded


def reward_roles(
    places: Mapping[str, RewardPlace], hosts: Iterable[Host], load: Callable[[Model], Loaded], *, shared: bool
) -> dict[str, Role]:
    """Roles of reward models by name, frozen. An adapter whose base is a host's is put beside the host's own.

    hosts: models at hand; what is loaded here joins them. load: loads a reward model with its head. shared: False loads
    each as a model of its own. The trained weights of the hosts stay as they are. Raises UserError where an adapter
    does not fit.
    """
    roles: dict[str, Role] = {}
    hosts = list(hosts) if shared else []
    for name, place in places.items():
        host = _host_of(place.location, hosts)
        if host is None:
            loaded = load(place.model)
            roles[name] = Role(loaded)
            if shared and place.location.adapter_folder is not None:
                hosts.append(Host(place.location, loaded))
        else:
            roles[name] = _beside(host.loaded, place.location, name)
    return roles


def _host_of(location: Location, hosts: Sequence[Host]) -> Host | None:
    """The host on whose base a reward model's adapter was trained; None for a model without an adapter."""
    if location.adapter_folder is None:
        return None
    return next((host for host in hosts if host.location.shares_base_with(location)), None)


def _beside(loaded: Loaded, location: Location, name: str) -> Role:
    """A reward model's adapter beside a loaded model's, with a head of the role's own where that model has none."""
    assert location.adapter_folder is not None
    with _trained_weights_kept(loaded.model):
        if has_score(loaded.transformer):
            load_beside(loaded.model, location.adapter_folder, name)
            return Role(loaded, name)
        head = load_reward_beside(loaded.model, location.adapter_folder, name)
    device = next(loaded.model.parameters()).device
    return Role(loaded, name, ScalarHead(head.to(device), trained=False))


@contextmanager
def _trained_weights_kept(model: torch.nn.Module) -> Iterator[None]:
    """peft makes an adapter that it adds trained, and freezes the others: restore which weights are."""
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in trained)
