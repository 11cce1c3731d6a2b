"""What the loop decides: warnings, refusals, the order of saving and looking."""

import pytest

from tuner.config import override
from tuner.errors import UserError
from tuner.training.devices import Devices
from tuner.training.loop import is_rising


@pytest.mark.parametrize(
    ("recent", "rising"),
    [
        ([(3.0, 2.0), (2.0, 2.1), (1.0, 2.2)], True),
        ([(3.0, 2.0), (2.0, 2.1), (1.0, 2.05)], False),  # fell again
        ([(3.0, 2.0), (3.5, 2.1), (1.0, 2.2)], False),  # training loss rose too: not learning by heart
        ([(3.0, 2.0), (2.0, 2.1)], False),  # two are no trend
    ],
)
def test_learning_by_heart_by_hand(recent, rising):
    assert is_rising(recent) is rising


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED"])
def test_sharding_plugins_are_refused(plugin, monkeypatch):
    from tests.equivalence.conftest import SMALL

    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(UserError, match=f"accelerate is configured for {plugin}"):
        Devices(SMALL)


def test_an_absent_gpu_is_said():
    import torch

    from tests.equivalence.conftest import SMALL

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="torch sees no GPU here"):
        Devices(override(SMALL, {"device": "cuda"}))


def test_ranks_that_accelerate_does_not_join_are_refused(monkeypatch):
    from tests.equivalence.conftest import SMALL

    monkeypatch.setenv(
        "WORLD_SIZE", "2"
    )  # as a launcher sets it, but without LOCAL_RANK there is no group to join
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises((UserError, ValueError)):
        Devices(SMALL)
