"""Config classes by stage name, as in JSON. A stage's class is imported when it is looked up."""

import importlib

from tuner.config.stage_config import StageConfig

_SHIPPED = {
    "sft": "tuner.config.sft_config:SFT",
    "reward": "tuner.config.reward_config:RewardModel",
    "dpo": "tuner.config.dpo_config:DPO",
    "kto": "tuner.config.kto_config:KTO",
    "ppo": "tuner.config.ppo_config:PPO",
    "grpo": "tuner.config.grpo_config:GRPO",
    "rloo": "tuner.config.rloo_config:RLOO",
    "cool": "tuner.config.cool_config:COOL",
}
"""Stage -> `module:class` of its config."""
_REGISTERED: dict[str, type[StageConfig]] = {}


def register_stage(config: type[StageConfig]) -> type[StageConfig]:
    """Register the config class of another package's stage, so that its configs load from JSON. Works as a decorator.

    Raises ValueError if the name is that of one of tuner's own stages.
    """
    name = config.model_fields["stage"].default
    if name in _SHIPPED:
        raise ValueError(f"stage {name!r} is one of tuner's own; choose another name")
    _REGISTERED[name] = config
    return config


def stage_names() -> list[str]:
    """Names of all stages, tuner's own and registered ones."""
    return [*_SHIPPED, *_REGISTERED]


def config_class(stage: str) -> type[StageConfig]:
    """The config class of a stage. Raises KeyError for an unknown one."""
    if stage in _REGISTERED:
        return _REGISTERED[stage]
    module, _, name = _SHIPPED[stage].partition(":")
    return getattr(importlib.import_module(module), name)
