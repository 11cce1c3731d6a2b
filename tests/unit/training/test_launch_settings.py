"""Settings of accelerate's launcher: read where they say what tuner does, refused in a sentence where they do not."""

import os

import pytest

from tests.equivalence.conftest import SMALL
from tuner.config import DPO, Model, Parallel, Preferences, override
from tuner.errors import UserError
from tuner.training import launch_settings
from tuner.training.devices import Devices
from tuner.training.launch_settings import layout

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets, and some of what is asked for in `accelerate config`."""


@pytest.fixture
def launched(monkeypatch):
    """Stand in for the launcher: launched({"WORLD_SIZE": "4", ...})."""
    launch_settings._launched.cache_clear()

    def launch(settings):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    yield launch
    launch_settings._launched.cache_clear()


def test_fsdp_of_all_processes_is_a_layout(launched):
    launched(FSDP | {"WORLD_SIZE": "4"})
    assert layout(SMALL) == Parallel(shard=4)
    assert layout(override(SMALL, {"parallel.shard": 4})) == Parallel(shard=4)
    with pytest.raises(UserError, match=r"parallel.shard=2, but accelerate is configured for FSDP over 4"):
        layout(override(SMALL, {"parallel.shard": 2}))


def test_libraries_do_not_see_it(launched):
    """accelerate would prepare an FSDP of its own, and transformers would read weights in the main process alone."""
    launched(FSDP | {"WORLD_SIZE": "1"})
    assert Devices.of(SMALL).mesh.shards is None
    assert not [name for name in os.environ if "FSDP" in name]
    assert layout(SMALL) == Parallel()  # once more, as in each round of a run


def test_a_parallelism_config_names_the_size(launched):
    sizes = {"DP_REPLICATE_SIZE": "2", "DP_SHARD_SIZE": "4", "TP_SIZE": "1", "CP_SIZE": "1", "SP_SIZE": "1"}
    sizes = {f"PARALLELISM_CONFIG_{name}": value for name, value in sizes.items()}
    launched(FSDP | sizes | {"WORLD_SIZE": "8", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"})
    assert layout(SMALL) == Parallel(shard=4)


def test_plain_processes_leave_the_layout_to_the_config(launched):
    launched({"WORLD_SIZE": "4", "FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_USE_FSDP": "false"})
    assert layout(SMALL) == Parallel()
    assert layout(override(SMALL, {"parallel.shard": 2})) == Parallel(shard=2)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, "fsdp_sharding_strategy=SHARD_GRAD_OP, but in tuner weights"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward=false, but in tuner weights"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params=true, but in tuner weights stay on the devices"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "but in tuner gradient_checkpointing is a field of the config"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size=2, but in tuner no layer is split"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which tuner does not use"),
    ],
)  # fmt: skip
def test_what_cannot_hold_is_refused(launched, setting, sentence):
    launched(FSDP | setting | {"WORLD_SIZE": "2"})
    with pytest.raises(UserError, match=sentence):
        layout(SMALL)


def test_trl_holds_a_model_whole(launched):
    launched(FSDP | {"WORLD_SIZE": "2"})
    data = Preferences(files=("a.jsonl",), template="internlm2")
    with pytest.raises(UserError, match=r"parallel.shard=2: TRL's trainers hold the model whole"):
        layout(DPO(model=Model(path="tuner:tiny"), data=data))
