"""The roles of a policy stage, loaded: the policy and, where they are needed, reference, critic and reward model.

They share as few models as their layout allows. On the meta device no weights are read: `tuner check` estimates memory
from what is built there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from tuner.config import Adapter, Model
from tuner.config.training import Recomputation
from tuner.data.conversation import Conversation, Turn
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.models.adapter_kinds import SCORE
from tuner.models.adapters import (
    ADAPTER,
    activate,
    add_adapter,
    copy_adapter,
    is_adapted,
    load_beside,
    refuse_changes_of_the_base,
    train_only,
)
from tuner.models.checkpointing import recompute_activations
from tuner.models.dropout import switch_off_dropout
from tuner.models.fingerprint import fingerprint
from tuner.models.load import (
    Head,
    Loaded,
    Precision,
    built_on,
    check_precision,
    load_model,
    refuse_reward_model,
)
from tuner.models.locate import Location, locate
from tuner.models.probe import prove_isolation
from tuner.models.reward_record import FILE as REWARD_RECORD
from tuner.models.reward_roles import REWARD, Host, RewardPlace, reward_role_names, reward_roles
from tuner.models.roles import Role, Roles, ScalarHead
from tuner.models.scorer import RewardInputs, reward_template
from tuner.models.sharding import shard
from tuner.models.tiled_mlp import tile_mlps
from tuner.models.tokenizer import read_tokenizer

if TYPE_CHECKING:  # models in one process do not load it
    from torch.distributed.device_mesh import DeviceMesh

POLICY, REFERENCE, CRITIC = "policy", "reference", "critic"
"""Names of the roles but for reward models'; on a shared base those of their adapters, too, but for the policy's, which
is peft's default."""


@dataclass(frozen=True)
class PolicyModels:
    """What the roles of a policy stage are loaded from."""

    policy: Model
    reference: Model | None
    """The reference policy; None: the policy as it starts."""
    reward: Model | None
    """The reward model; None where a rule computes rewards."""
    adapter: Adapter | None
    """The policy's adapter."""
    critic_adapter: Adapter | None
    """The critic's adapter, where it starts from a model without one."""
    critic_from: Literal["reward", "policy"]
    """Model the critic is initialized from."""
    layout: Literal["shared", "separate"]
    """"shared": adapters and heads on each distinct base; "separate": one model per role."""
    roles: frozenset[str]
    """Roles needed beside the policy: of "reference", "critic", "reward"."""
    template: str
    """Chat template of the prompts."""
    precision: Precision
    seed: int
    """Seed of fresh adapters."""
    gradient_checkpointing: Recomputation
    mlp_tile: int | None = None
    further_rewards: tuple[Model, ...] = ()
    """Further reward models beside `reward`."""

    def __post_init__(self) -> None:
        """Raises ValueError for a critic that starts from a reward model without a role."""
        if self.critic_starts_from == REWARD and self.reward_role is None:
            raise ValueError("a critic that starts from the reward model needs one, with a role")

    @property
    def critic_starts_from(self) -> Literal["reward", "policy"] | None:
        """Model the critic is initialized from; None without a critic."""
        return self.critic_from if CRITIC in self.roles else None

    @property
    def reward_role(self) -> Model | None:
        """The reward model, where there is one and its role is needed."""
        return self.reward if REWARD in self.roles else None

    @property
    def rewards(self) -> dict[str, Model]:
        """The reward models by role; none where there is none or it is not needed."""
        if self.reward_role is None:
            return {}
        models = (self.reward_role, *self.further_rewards)
        return dict(zip(reward_role_names(len(models)), models, strict=True))

    @property
    def reference_role(self) -> Model | None:
        """The reference's own model, where it has one and its role is needed."""
        return self.reference if REFERENCE in self.roles else None


@dataclass(frozen=True)
class PolicyRoles:
    """The roles of a policy stage, and the inputs of its reward models."""

    roles: Roles
    """`policy`, and those of `reference`, `critic` and `reward` that were needed; `reward_2`, ... are further reward
    models."""
    reward_inputs: dict[str, RewardInputs]
    """By role of a reward model: from answers and conditions to what it reads."""
    fingerprints: dict[str, str]
    """Of the policy, a reference of its own and the reward models as they are loaded: bases and adapters."""
    description: str
    """Which roles stand on which base, in words."""


def load_policy_roles(
    models: PolicyModels,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    processes: DeviceMesh | None = None,
    *,
    install_kernels: Callable[[Sequence[Loaded]], None] = lambda models: None,
) -> PolicyRoles:
    """Load the roles of a policy stage, without dropout, proven to keep packed samples apart.

    The reference is the policy as it starts, or a model of its own; the critic starts from the reward model or the
    policy, with a fresh head of zeros. processes: those that hold weights together; see `load_model`. install_kernels:
    called with the distinct models once they are proven, and before their layers are checkpointed. On the meta device
    the same roles are built without reading weights. Raises UserError when a model is missing, the reward model
    has no scalar head, or critic or reference cannot read what the policy writes.
    """
    loader = _Loader(models, device, processes)
    with built_on(device):
        roles = _shared(loader) if models.layout == "shared" else _separate(loader)
    together = Roles(roles, autocast)
    for loaded in together.models:
        switch_off_dropout(loaded.model)
        if processes is not None:
            shard(loaded, processes)
        if device.type != "meta":
            prove_isolation(loaded, device, autocast())
    install_kernels(together.models)
    for loaded in together.models:
        recompute_activations(loaded.model, models.gradient_checkpointing)
        tile_mlps(loaded.model, models.mlp_tile)
    inputs, fingerprints = {}, {POLICY: _identity(loader.policy)}
    if models.reference_role is not None:
        fingerprints[REFERENCE] = _identity(loader.reference)
    for name, place in loader.rewards.items():
        inputs[name] = RewardInputs.of(place.model, place.location, roles[name].loaded)
        fingerprints[name] = _identity(place.location)
    return PolicyRoles(together, inputs, fingerprints, _description(roles, together))


class _Loader:
    """Locates the models of a policy stage, checks that they fit together, and loads them."""

    def __init__(self, models: PolicyModels, device: torch.device, processes: DeviceMesh | None) -> None:
        self.models, self.device, self.processes = models, device, processes
        self.policy = self._locate(models.policy)
        refuse_reward_model(self.policy, models.policy.path)
        if models.reference_role is not None:
            refuse_reward_model(self.reference, models.reference_role.path)
            check_precision(self.reference, models.precision)
            _check_reference(models.reference_role, self.reference, models.policy, self.policy)
        for place in self.rewards.values():
            check_precision(place.location, models.precision)
            place.check()
        if models.critic_starts_from == REWARD:
            _check_language(models, self.policy, self.reward)
        _check_critic_adapter(self)

    @cached_property
    def rewards(self) -> dict[str, RewardPlace]:
        """The reward models by role."""
        return {name: RewardPlace(model, self._locate(model)) for name, model in self.models.rewards.items()}

    @property
    def reward(self) -> Location:
        """Location of the first reward model, which is needed."""
        return self.rewards[REWARD].location

    @cached_property
    def reference(self) -> Location:
        """Location of the reference's own model, which is needed."""
        assert self.models.reference_role is not None
        return self._locate(self.models.reference_role)

    def load(
        self, model: Model, *, head: Head = "language", train: bool = True, adapter: Adapter | None = None
    ) -> Loaded:
        return load_model(
            model,
            precision=self.models.precision,
            device=self.device,
            adapter=adapter,
            seed=self.models.seed,
            train=train,
            head=head,
            processes=self.processes,
        )

    def _locate(self, model: Model) -> Location:
        """On the meta device weights are not fetched, but bases that are here are compared by their weights, too."""
        weights = self.device.type != "meta"
        location = locate(model, self.models.precision, weights=weights)
        if not location.reference.fingerprint and any(location.base_folder.glob("*.safetensors")):
            reference = replace(location.reference, fingerprint=fingerprint(location.base_folder))
            return replace(location, reference=reference)
        return location


def _check_reference(model: Model, location: Location, policy_model: Model, policy: Location) -> None:
    """UserError where the reference would read other tokens than the policy writes."""
    tokenizers = [
        read_tokenizer(place.tokenizer_folder, trust_remote_code=named.trust_remote_code)
        for named, place in ((policy_model, policy), (model, location))
    ]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise UserError(
            f"reference: the tokenizer of {model.path} is not that of the policy {policy_model.path}, whose tokens it "
            "reads; name a model that the policy was trained from"
        )


def _check_language(models: PolicyModels, policy: Location, reward: Location) -> None:
    """UserError where a critic made from the reward model would read other tokens than the policy writes."""
    assert models.reward is not None
    policy_tokenizer = read_tokenizer(
        policy.tokenizer_folder, trust_remote_code=models.policy.trust_remote_code
    )
    tokenizer, template = reward_template(models.reward, reward)
    policy_template = Template(models.template, policy_tokenizer)  # pyright: ignore[reportArgumentType]
    # the critic reads the policy's token ids as they are; a reward model alone reads the answers' text
    if policy_tokenizer.get_vocab() != tokenizer.get_vocab():
        what = "tokenizers"
    elif _rendered_probe(policy_template) != _rendered_probe(template):
        what = "chat templates"
    else:
        return
    raise UserError(
        f"{models.reward.path}: the {what} of policy and reward model differ, so the critic cannot start from "
        'the reward model; write critic_from="policy" (answers are scored through their text)'
    )


def _check_critic_adapter(loader: _Loader) -> None:
    """UserError where a shared critic continues a saved adapter, and critic_adapter is another."""
    models = loader.models
    requested = models.critic_adapter
    if requested is None or models.layout == "separate":  # load_model checks a separate critic's adapter
        return
    if models.critic_starts_from == POLICY:
        start, adapter = "policy", models.adapter or loader.policy.adapter
    elif models.critic_starts_from == REWARD and loader.reward.adapter_folder is not None:
        start, adapter = "reward model", loader.reward.adapter
    else:
        return
    if adapter is None or requested.model_copy(update={"dropout": adapter.dropout}) != adapter:
        raise UserError(
            f'critic_adapter: with roles="shared" this critic starts as a copy of the {start}\'s own adapter, which is '
            "another; leave critic_adapter out"
        )


def _rendered_probe(template: Template) -> str:
    """Conversations as a template renders them: two templates may differ in source and render the same text."""
    turns = tuple(Turn(role, role) for role in ("system", "user", "assistant", "user", "assistant"))
    return "".join(_rendered(template, conversation) for conversation in (turns, turns[1:]))


def _rendered(template: Template, turns: tuple[Turn, ...]) -> str:
    try:
        return template.render(Conversation(turns, origin="a probe")).text
    except UserError:  # not every template accepts a system turn
        return ""


def _shared(loader: _Loader) -> dict[str, Role]:
    """Every base once: adapters and heads on the policy's, and on the reward model's where that is another."""
    models = loader.models
    loaded = loader.load(models.policy, adapter=models.adapter)
    policy = loaded.model
    if not is_adapted(policy):
        return _whole_policy(loader, loaded)
    roles, trained = {POLICY: Role(loaded)}, [ADAPTER]
    if REFERENCE in models.roles:
        roles[REFERENCE] = _shared_reference(loader, loaded)
    zeros = torch.zeros(1, loaded.transformer.config.hidden_size, device=loader.device)
    if models.critic_starts_from == POLICY:
        copy_adapter(policy, ADAPTER, CRITIC)
        roles[CRITIC] = Role(loaded, CRITIC, ScalarHead(zeros, trained=True))
        trained.append(CRITIC)
    host = Host(loader.policy, loaded)
    if models.reward_role is not None and _is_beside(loader.policy, loader.reward):
        roles |= _rewards(loader, [host], [REWARD])
        if models.critic_starts_from == REWARD:
            copy_adapter(policy, REWARD, CRITIC)
            roles[CRITIC] = Role(loaded, CRITIC, ScalarHead(zeros, trained=True))
            trained.append(CRITIC)
    else:
        roles |= _on_its_own_base(loader, loaded.adapter)
    roles |= _further_rewards(loader, [host], roles)
    # last: peft makes an adapter that it activates trained, and adding one activates
    train_only(policy, *trained)
    activate(policy, ADAPTER)
    return _in_order(roles)


def _shared_reference(loader: _Loader, loaded: Loaded) -> Role:
    """The reference beside an adapted policy: a copy of its adapter, one of its own, its base, or another model."""
    model = loader.models.reference_role
    if model is None:
        copy_adapter(loaded.model, ADAPTER, REFERENCE)
        return Role(loaded, REFERENCE)
    if not loader.policy.shares_base_with(loader.reference):
        return Role(loader.load(model, train=False))
    if loader.reference.adapter_folder is None:
        refuse_changes_of_the_base(loaded.model)
        return Role(loaded, None)
    load_beside(loaded.model, loader.reference.adapter_folder, REFERENCE)
    return Role(loaded, REFERENCE)


def _whole_policy(loader: _Loader, loaded: Loaded) -> dict[str, Role]:
    """A policy that is trained without an adapter: no other role can share its weights, which change."""
    models = loader.models
    if models.roles - {REWARD}:
        raise UserError(
            f'{models.policy.path}: roles="shared" trains adapters on a frozen base, and this policy has none; '
            'add adapter=LoRA(), or write roles="separate"'
        )
    roles = {POLICY: Role(loaded), **_on_its_own_base(loader, None)}
    return roles | _further_rewards(loader, [], roles)


def _rewards(loader: _Loader, hosts: Iterable[Host], names: Iterable[str]) -> dict[str, Role]:
    """Some of the reward models, beside hosts on their bases where the layout shares them."""
    return reward_roles(
        {name: loader.rewards[name] for name in names},
        hosts,
        lambda model: loader.load(model, head="score", train=False),
        shared=loader.models.layout == "shared",
    )


def _further_rewards(loader: _Loader, hosts: list[Host], roles: Mapping[str, Role]) -> dict[str, Role]:
    """The reward models without a role yet: beside the policy, beside the first reward model, or on bases of their
    own."""
    first = roles.get(REWARD)
    # a critic's adapter on a whole reward model is no adapter that was trained on the reward model's base
    if first is not None and first.head is None and loader.reward.adapter_folder is not None:
        hosts = [*hosts, Host(loader.reward, first.loaded)]
    return _rewards(loader, hosts, [name for name in loader.rewards if name not in roles])


def _is_beside(policy: Location, reward: Location) -> bool:
    """Whether a reward model is an adapter on the policy's base."""
    return reward.adapter_folder is not None and policy.shares_base_with(reward)


def _on_its_own_base(loader: _Loader, policy_adapter: Adapter | None) -> dict[str, Role]:
    """The reward model on the base it was trained on, and the critic beside it where it starts from there."""
    models = loader.models
    if models.reward_role is None:
        return {}
    loaded = loader.load(models.reward_role, head="score", train=False)
    if models.critic_starts_from != REWARD:
        return {REWARD: Role(loaded)}
    if is_adapted(loaded.model):
        copy_adapter(loaded.model, ADAPTER, CRITIC)
        train_only(loaded.model, CRITIC)
        roles = {CRITIC: Role(loaded, CRITIC), REWARD: Role(loaded)}
    else:
        adapter = models.critic_adapter or models.adapter or policy_adapter
        if adapter is None:
            raise UserError(
                f"{models.reward_role.path}: the critic needs an adapter on this reward model, and the settings of the "
                "policy's are not known, as tuner did not write it; add critic_adapter=LoRA(...)"
            )
        wrapped = add_adapter(loaded.transformer, adapter.model_copy(update={"dropout": 0.0}), models.seed)
        loaded = replace(loaded, model=wrapped.eval(), adapter=adapter)
        roles = {CRITIC: Role(loaded, ADAPTER), REWARD: Role(loaded, None)}
    _clear_head(roles[CRITIC])
    return roles


def _separate(loader: _Loader) -> dict[str, Role]:
    """One model per role, each as it would be loaded alone; policy and critic are trained."""
    models = loader.models
    roles = {POLICY: Role(loader.load(models.policy, adapter=models.adapter))}
    if REFERENCE in models.roles:
        roles[REFERENCE] = _separate_reference(loader)
    roles |= _rewards(loader, [], loader.rewards)
    if CRITIC in models.roles:
        roles[CRITIC] = _separate_critic(loader)
    return _in_order(roles)


def _separate_reference(loader: _Loader) -> Role:
    models = loader.models
    # loaded to be trained, as the policy is, in its dtypes: rounded weights would be another model
    if models.reference_role is None:
        reference = loader.load(models.policy, adapter=models.adapter)
    else:
        reference = loader.load(models.reference_role)
    reference.model.requires_grad_(False)
    return Role(reference)


def _separate_critic(loader: _Loader) -> Role:
    models = loader.models
    adapter = models.critic_adapter
    if models.critic_starts_from == REWARD:
        assert models.reward is not None
        start = models.reward
    else:
        start = models.policy
        adapter = adapter or models.adapter
    critic = Role(loader.load(start, head="score", adapter=adapter))
    _clear_head(critic)
    return critic


def _in_order(roles: dict[str, Role]) -> dict[str, Role]:
    first = [name for name in (POLICY, REFERENCE, CRITIC, REWARD) if name in roles]
    return {name: roles[name] for name in dict.fromkeys([*first, *roles])}


def _clear_head(critic: Role) -> None:
    """Set the critic's head to zeros, whatever model it was made from."""
    with torch.no_grad():
        for name, weight in critic.trained().items():
            if f".{SCORE}." in f".{name}":
                weight.zero_()


def _identity(location: Location) -> str:
    """Hash of a model's base and adapter, its chat template and tokenizer, and its reward record."""
    files = hashlib.sha256()
    for name in ("adapter_config.json", REWARD_RECORD, "chat_template.jinja", "tokenizer.json"):
        if (location.folder / name).is_file():
            files.update((location.folder / name).read_bytes())
    adapter = location.adapter_folder
    of_adapter = [] if adapter is None else [fingerprint(adapter)]
    return "-".join([*of_adapter, location.reference.fingerprint, files.hexdigest()])


def _description(roles: dict[str, Role], together: Roles) -> str:
    parts = []
    for loaded in together.models:
        names = [name for name, role in roles.items() if role.loaded.model is loaded.model]
        held_in = loaded.base.quantization or loaded.precision
        parts.append(f"{', '.join(names)} on {loaded.base.path} ({held_in})")
    return "roles: " + "; ".join(parts)
