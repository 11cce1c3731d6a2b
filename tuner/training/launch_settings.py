"""What `accelerate config` says of shards: read where it is what tuner does, refused where it is not."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

from tuner.config import override
from tuner.config.parallel import Parallel
from tuner.config.stage_config import TrainingConfig
from tuner.errors import UserError

_SWITCHES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
}
_PREFIXES = ("FSDP_", "PARALLELISM_CONFIG_")
_SAME = {
    "FSDP_SHARDING_STRATEGY": (("FULL_SHARD", "1", ""), "weights are gathered for a layer at a time (FULL_SHARD)"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "FULL_SHARD"), "weights are gathered again in the backward pass (true)"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "weights stay on the devices (false)"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "gradient_checkpointing is a field of the config (false)"),
    "PARALLELISM_CONFIG_TP_SIZE": (("1",), "no layer is split over processes (1)"),
    "PARALLELISM_CONFIG_CP_SIZE": (("1",), "parallel.sequence says which processes compute rows together (1)"),
    "PARALLELISM_CONFIG_SP_SIZE": (("1",), "parallel.sequence says which processes compute rows together (1)"),
}  # fmt: skip
"""Setting -> the values that say what tuner does, and what that is."""


def layout(config: TrainingConfig) -> Parallel:
    """The layout of a run's processes, of its config and the launcher's settings, which may each name one.

    Raises UserError where they contradict each other, and for settings that tuner does not have.
    """
    settings = _launched()
    if "ACCELERATE_USE_DEEPSPEED" in settings:
        raise UserError(
            "accelerate is configured for DeepSpeed, which tuner does not use: choose multi-GPU or FSDP in "
            "`accelerate config`; parallel=Parallel(shard=N) divides what ZeRO stage 3 does (docs/scaling.md)"
        )
    if not settings:
        return config.parallel
    for name, (same, what_tuner_does) in _SAME.items():
        if name in settings and settings[name] not in same:
            raise UserError(
                f"accelerate is configured with {name.lower()}={settings[name]}, but in tuner {what_tuner_does}: "
                "change it in `accelerate config`"
            )
    shard = int(settings.get("PARALLELISM_CONFIG_DP_SHARD_SIZE") or os.environ.get("WORLD_SIZE", "1"))
    if config.parallel.shard not in (1, shard):
        raise UserError(
            f"parallel.shard={config.parallel.shard}, but accelerate is configured for FSDP over {shard} processes: "
            "write the same, or choose plain multi-GPU in `accelerate config`"
        )
    return override(config, {"parallel.shard": shard}).parallel


@functools.cache  # they are taken away
def _launched() -> Mapping[str, str]:
    """The launcher's settings of shards by their names in the environment, of which they are then gone.

    Left there, accelerate would prepare for an FSDP of its own, which averages gradients and skips 4-bit weights (on
    CPU: DDP, without a word), and transformers would read weights in the main process alone.
    """
    switched = {name for name in _SWITCHES if os.environ.get(name, "false").lower() in ("true", "1")}
    names = [name for name in os.environ if name in _SWITCHES or name.startswith(_PREFIXES)]
    values = {name: os.environ.pop(name) for name in names}
    return (
        {name: value for name, value in values.items() if name not in _SWITCHES or name in switched}
        if switched
        else {}
    )
