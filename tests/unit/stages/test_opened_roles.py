"""A role, and with it autocast, is entered once per update: left after every pass, it would cast all weights again."""

from collections import Counter
from contextlib import contextmanager

import pytest

import tuner
from tests.golden.runs import QLORA
from tuner.config import PPO, AdamW, Model, Prompts, Rule, Sampling, StageConfig, override
from tuner.models.roles import Roles
from tuner.training.step import Step

POLICY = PPO(
    policy=Model(path="tuner:tiny"),
    adapter=QLORA.adapter,
    reward=Rule(function="rules.py:length"),
    prompts=Prompts(files=("tuner:manners/prompts.jsonl",), limit=24, template="internlm2", max_length=64),
    prompts_per_step=12,
    sampling=Sampling(max_new_tokens=8),
    optimizer=AdamW(lr=1e-4),
    tokens_per_pass=72,
    mini_batches=2,
    critic_from="policy",
    critic_warmup=0,
    precision="fp32",
    gradient_checkpointing=False,
)


@pytest.mark.parametrize(
    ("config", "opened"),
    [
        (override(QLORA, {"max_steps": 2, "tokens_per_pass": 128}), {"policy": 2}),
        (override(POLICY, {"max_steps": 1}), {"policy": 2, "critic": 2}),
    ],
    ids=["sft", "ppo"],
)
def test_a_role_is_opened_once_per_update(config: StageConfig, opened, tmp_path, monkeypatch) -> None:
    (tmp_path / "rules.py").write_text("def length(answer, row):\n    return len(answer) / 100\n")
    monkeypatch.chdir(tmp_path)
    original, counts = Roles.role, Counter[str]()

    @contextmanager
    def role(self, name, *, train=False):
        counts[name] += train
        with original(self, name, train=train) as model:
            yield model

    monkeypatch.setattr(Roles, "role", role)
    backward, passes = Step.backward, Counter[int]()
    monkeypatch.setattr(Step, "backward", lambda step: (passes.update([step.index]), backward(step)))
    tuner.train(override(config, {"name": "run"}), runs=tmp_path)
    assert sum(passes.values()) >= 2 * sum(opened.values()), "updates of several passes"
    assert +counts == opened
