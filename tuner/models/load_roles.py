"""The four roles of PPO, loaded: policy, reference, critic and reward, on as few models as their layout allows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from tuner.config import PPO, LoRA, Model
from tuner.data.conversation import Conversation, Turn
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.models.adapters import (
    ADAPTER,
    SCORE,
    activate,
    add_adapter,
    copy_adapter,
    is_adapted,
    load_beside,
    train_only,
)
from tuner.models.checkpointing import recompute_activations
from tuner.models.fingerprint import fingerprint
from tuner.models.load import Loaded, check_precision, load_model, refuse_reward_model
from tuner.models.locate import Location, locate
from tuner.models.probe import prove_isolation
from tuner.models.reward_record import FILE as REWARD_RECORD
from tuner.models.roles import Role, Roles, ScalarHead
from tuner.models.scorer import Sequences, reward_template
from tuner.models.tokenizer import read_tokenizer

REFERENCE, CRITIC, REWARD = "reference", "critic", "reward"
"""Names of the adapters beside the policy's, which is peft's default."""


@dataclass(frozen=True)
class PolicyRoles:
    """PPO's roles, and how the reward model is asked."""

    roles: Roles
    """`policy`, `reference`, `critic` and `reward`."""
    sequences: Sequences
    """From answers and conditions to what the reward model reads."""
    fingerprints: dict[str, str]
    """What policy and reward model were made of when the run began: bases and adapters."""
    told: str
    """Which roles stand on which base, in words."""


def load_policy_roles(
    config: PPO, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
) -> PolicyRoles:
    """Load the four roles of a config, without dropout, proven to keep packed samples apart.

    The reference is the policy as it starts; the critic starts from the reward model or the policy, with a fresh
    head of zeros. Raises UserError when a model is missing, the reward model is none, or the critic cannot read
    what the policy writes.
    """
    places = _Places(config, device)
    shared = config.roles == "shared"
    roles = _shared(places) if shared else _separate(places)
    for loaded in _models(roles):
        switch_off_dropout(loaded.model)
        if config.gradient_checkpointing:
            recompute_activations(loaded.model)
        prove_isolation(loaded, device, autocast())
    reward = roles[REWARD].loaded
    sequences = Sequences.of(config.reward, places.reward, reward)
    fingerprints = {"policy": _identity(places.policy), "reward": _identity(places.reward)}
    return PolicyRoles(Roles(roles, autocast), sequences, fingerprints, _told(roles))


class _Places:
    """Where the models of a config lie, and how they are loaded."""

    def __init__(self, config: PPO, device: torch.device) -> None:
        self.config, self.device = config, device
        self.policy = locate(config.policy, config.precision)
        self.reward = locate(config.reward, config.precision)
        check_precision(self.reward, config.precision)
        check_language(config, self.policy, self.reward)
        check_critic_adapter(config, self.policy, self.reward)

    def load(
        self, model: Model, *, head: Any = "language", train: bool = True, adapter: LoRA | None = None
    ) -> Loaded:
        return load_model(
            model,
            precision=self.config.precision,
            device=self.device,
            adapter=adapter,
            seed=self.config.seed,
            train=train,
            head=head,
        )


def check_language(config: PPO, policy: Location, reward: Location) -> None:
    """Policy and reward model must be what they are called, and a critic made from the reward model must read what
    the policy reads; UserError where it is otherwise."""
    refuse_reward_model(policy, config.policy.path)
    if not reward.has_score:
        raise UserError(
            f"{config.reward.path}: this is no reward model: it has no scalar head; train one from it first"
        )
    if config.critic_from == "policy":
        return
    ours = read_tokenizer(policy.tokenizer_folder, trust_remote_code=config.policy.trust_remote_code)
    theirs, talk = reward_template(config.reward, reward)
    if ours.get_vocab() != theirs.get_vocab():
        what = "tokenizers"
    elif _spoken(Template(config.prompts.template, ours)) != _spoken(talk):
        what = "chat templates"
    else:
        return
    raise UserError(
        f"{config.reward.path}: the {what} of policy and reward model differ, so the critic cannot start from "
        'the reward model; write critic_from="policy" (answers are scored through their text)'
    )


def check_critic_adapter(config: PPO, policy: Location, reward: Location) -> None:
    """UserError where a shared critic goes on with an adapter that is there, and critic_adapter is another."""
    asked = config.critic_adapter
    if asked is None or config.roles == "separate":  # there the adapter is loaded as any that is gone on with
        return
    if config.critic_from == "policy":
        start, had = "policy", config.adapter or policy.lora
    elif reward.adapter_folder is not None:
        start, had = "reward model", reward.lora
    else:
        return
    if had is None or asked.model_copy(update={"dropout": had.dropout}) != had:
        raise UserError(
            f'critic_adapter: with roles="shared" this critic starts as a copy of the {start}\'s own adapter, which is '
            "another; leave critic_adapter out"
        )


def _spoken(template: Template) -> str:
    """Conversations as a template has them: two may be written differently and say the same."""
    turns = tuple(Turn(role, role) for role in ("system", "user", "assistant", "user", "assistant"))
    return "".join(_rendered(template, some) for some in (turns, turns[1:]))


def _rendered(template: Template, turns: tuple[Turn, ...]) -> str:
    try:
        return template.render(Conversation(turns, origin="a probe")).text
    except UserError:  # not every family takes a system turn
        return ""


def without_adapter(config: PPO) -> str:
    """What is said of a policy that is to share its base and has no adapter."""
    return (
        f'{config.policy.path}: roles="shared" trains adapters on a frozen base, and this policy has none; '
        'add adapter=LoRA(), or write roles="separate"'
    )


def _shared(places: _Places) -> dict[str, Role]:
    """Every base once: adapters and heads on the policy's, and on the reward model's where that is another."""
    config = places.config
    loaded = places.load(config.policy, adapter=config.adapter)
    policy = loaded.model
    if not is_adapted(policy):
        raise UserError(without_adapter(config))
    copy_adapter(policy, ADAPTER, REFERENCE)
    roles = {"policy": Role(loaded), REFERENCE: Role(loaded, REFERENCE)}
    trained = [ADAPTER]
    zeros = torch.zeros(1, loaded.transformer.config.hidden_size, device=places.device)
    if config.critic_from == "policy":
        copy_adapter(policy, ADAPTER, CRITIC)
        roles[CRITIC] = Role(loaded, CRITIC, ScalarHead(zeros, trained=True))
        trained.append(CRITIC)
    if is_on_one_base(places.policy, places.reward):
        assert places.reward.adapter_folder is not None
        head = load_beside(policy, places.reward.adapter_folder, REWARD)
        roles[REWARD] = Role(loaded, REWARD, ScalarHead(head.to(places.device), trained=False))
        if config.critic_from == "reward":
            copy_adapter(policy, REWARD, CRITIC)
            roles[CRITIC] = Role(loaded, CRITIC, ScalarHead(zeros, trained=True))
            trained.append(CRITIC)
    else:
        roles |= _on_its_own_base(places, loaded.lora)
    train_only(policy, *trained)
    activate(policy, ADAPTER)
    return {name: roles[name] for name in ("policy", REFERENCE, CRITIC, REWARD) if name in roles}


def _on_its_own_base(places: _Places, lora: LoRA | None) -> dict[str, Role]:
    """The reward model on the base it was trained on, and the critic beside it where it starts from there."""
    config = places.config
    loaded = places.load(config.reward, head="score", train=False)
    adapted = is_adapted(loaded.model)
    if config.critic_from == "policy":
        return {REWARD: Role(loaded)}
    if adapted:
        copy_adapter(loaded.model, ADAPTER, CRITIC)
        train_only(loaded.model, CRITIC)
        roles = {CRITIC: Role(loaded, CRITIC), REWARD: Role(loaded)}
    else:
        made = config.critic_adapter or config.adapter or lora
        if made is None:
            raise UserError(
                f"{config.reward.path}: the critic needs an adapter on this reward model, and the policy's was made "
                "elsewhere, so its settings are not known; add critic_adapter=LoRA(...)"
            )
        wrapped = add_adapter(loaded.transformer, made.model_copy(update={"dropout": 0.0}), config.seed)
        loaded = Loaded(wrapped.eval(), loaded.tokenizer, loaded.base, made, loaded.precision)
        roles = {CRITIC: Role(loaded, ADAPTER), REWARD: Role(loaded, None)}
    _clear_head(roles[CRITIC])
    return roles


def _separate(places: _Places) -> dict[str, Role]:
    """Four models, each as it would be loaded alone; policy and critic trained."""
    config = places.config
    policy = places.load(config.policy, adapter=config.adapter)
    reference = places.load(config.policy, adapter=config.adapter)
    reference.model.requires_grad_(False)  # held as the policy is: rounded weights would be another's
    reward = places.load(config.reward, head="score", train=False)
    start = config.reward if config.critic_from == "reward" else config.policy
    asked = config.critic_adapter
    if config.critic_from == "policy" and asked is None:
        asked = config.adapter
    critic = places.load(start, head="score", adapter=asked)
    _clear_head(Role(critic))
    return {"policy": Role(policy), REFERENCE: Role(reference), CRITIC: Role(critic), REWARD: Role(reward)}


def _clear_head(critic: Role) -> None:
    """A critic begins at zero: its head is fresh, whatever it was made from."""
    with torch.no_grad():
        for name, weight in critic.trained().items():
            if f".{SCORE}." in f".{name}":
                weight.zero_()


def switch_off_dropout(model: torch.nn.Module) -> None:
    """No dropout in training mode either: a ratio of two passes must be that of the weights alone."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _models(roles: dict[str, Role]) -> Iterator[Loaded]:
    """Every model once."""
    yield from {id(role.loaded.model): role.loaded for role in roles.values()}.values()


def _identity(location: Location) -> str:
    """Hash of a model's adapter and base, of how it talks, and of how it is to be asked."""
    beside = hashlib.sha256()
    for name in ("adapter_config.json", REWARD_RECORD, "chat_template.jinja", "tokenizer.json"):
        if (location.folder / name).is_file():
            beside.update((location.folder / name).read_bytes())
    adapter = location.adapter_folder
    own = [] if adapter is None else [fingerprint(adapter)]
    return "-".join([*own, location.reference.fingerprint, beside.hexdigest()])


def _told(roles: dict[str, Role]) -> str:
    said = []
    for loaded in _models(roles):
        names = [name for name, role in roles.items() if role.loaded.model is loaded.model]
        held = loaded.base.quantization or loaded.precision
        said.append(f"{', '.join(names)} on {loaded.base.path} ({held})")
    return "roles: " + "; ".join(said)


def is_on_one_base(policy: Location, reward: Location) -> bool:
    """Whether a reward model is an adapter on what a policy stands on."""
    same = ("fingerprint", "quantization", "rope", "precision")
    return reward.adapter_folder is not None and all(
        getattr(policy.reference, name) == getattr(reward.reference, name) for name in same
    )
