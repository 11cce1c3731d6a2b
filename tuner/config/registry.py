"""Which stages there are, by the name they have in JSON. A stage's config class is imported when it is asked for."""

import importlib

from tuner.config.stage_config import StageConfig

_HOMES = {
    "sft": "tuner.config.sft_config:SFT",
    "reward": "tuner.config.reward_config:RewardModel",
    "dpo": "tuner.config.dpo_config:DPO",
    "ppo": "tuner.config.ppo_config:PPO",
    "grpo": "tuner.config.grpo_config:GRPO",
    "rloo": "tuner.config.rloo_config:RLOO",
}
"""Stage -> `module:class` of its config."""
_REGISTERED: dict[str, type[StageConfig]] = {}


def register_stage(config: type[StageConfig]) -> type[StageConfig]:
    """Make a stage of another package known, so that its configs load from JSON; usable as a decorator.

    Raises ValueError when tuner has a stage of that name.
    """
    name = config.model_fields["stage"].default
    if name in _HOMES:
        raise ValueError(f"stage {name!r} comes with tuner; choose another name")
    _REGISTERED[name] = config
    return config


def stage_names() -> list[str]:
    """Names of all known stages."""
    return [*_HOMES, *_REGISTERED]


def config_class(stage: str) -> type[StageConfig]:
    """The config class of a stage. Raises KeyError for an unknown one."""
    if stage in _REGISTERED:
        return _REGISTERED[stage]
    module, _, name = _HOMES[stage].partition(":")
    return getattr(importlib.import_module(module), name)
