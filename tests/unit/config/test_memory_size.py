"""What `memory` may be: a size, "auto" or nothing, and each other value is refused in a sentence."""

import pytest

from tuner.config import PPO, SFT, VLLM, Chat, Model, from_json, load_config, override, to_json
from tuner.config.memory_size import gib
from tuner.errors import UserError

CONFIG = SFT(
    name="small",
    model=Model(path="tuner:tiny"),
    data=Chat(files=("tuner:sums/train.jsonl",), template="internlm2"),
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12.0), ("12 GiB", 12.0), ("1.5GiB", 1.5), ("80GB", 80e9 / 2**30), ("auto", None)],
)
def test_sizes(text: str, size: float | None) -> None:
    config = override(CONFIG, [f"memory={text}"])
    assert config.memory == text
    assert gib(text) == (None if size is None else pytest.approx(size))
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    "value", ["12", "12gib", "12 MiB", "-1GiB", "0GiB", "GiB", "Auto", 12, 12.5, True, ""]
)
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r'memory: .* is no size: write one such as "12GiB"'):
        override(CONFIG, {"memory": value})


def test_a_server_on_the_same_gpu_needs_a_size() -> None:
    policy = override(load_config("internlm2_7b_ppo"), {"engine": VLLM()})
    assert isinstance(policy, PPO)
    with pytest.raises(UserError, match='memory="auto" is what the GPU has free before'):
        override(policy, {"memory": "auto"})
    for changes in ({"memory": "40GiB"}, {"memory": "auto", "engine.url": "http://localhost:8000"}):
        assert override(policy, changes).memory == changes["memory"]
