"""What an update learns beside its surrogate, by plain torch: the entropy bonus, the critic's steps and returns."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.rollout.test_experience import SCORES, One, of_answers, updates, with_rewards
from tests.unit.rollout.test_experience import observed as observed_by_token
from tests.unit.rollout.test_rollout import rollout
from tests.unit.rollout.test_shaping import CONFIG
from tests.whole_models import full_logits
from tuner.algorithms.algorithm import algorithm_of
from tuner.algorithms.ppo import PPO as PPOAlgorithm
from tuner.algorithms.ppo import Valued
from tuner.config import GRPO, PPO, RLOO, LoRA, Model, PolicyConfig, Prompts, override
from tuner.data.batch import make_batch
from tuner.data.stream import Contents
from tuner.losses.policy import advantages
from tuner.models.adapters import ADAPTER, copy_adapter, train_only
from tuner.models.load import Loaded, load_model
from tuner.models.roles import Role, Roles, ScalarHead
from tuner.rollout.rollout import Rollout
from tuner.training.devices import Devices
from tuner.training.step import Step
from tuner.training.updater import UpdateResult

BONUS, TEMPERATURE = 0.3, 0.7


class Recorder:
    """An updater that steps nothing, and notes which sets were to be stepped and their gradients."""

    def __init__(self, roles: Roles) -> None:
        self.roles, self.applied = roles, []

    def apply(
        self, step: int, sums: Mapping[tuple[str, str], torch.Tensor], sets: Sequence[str]
    ) -> UpdateResult:
        self.applied.append((tuple(sets), {name: gradients(self.roles, name) for name in self.roles}))
        return UpdateResult({name: value.item() for name, value in sums.items()}, {}, applied=True)


def gradients(roles: Roles, name: str) -> list[torch.Tensor]:
    """Of a role's trained weights, which are cleared."""
    weights = list(roles.trained(name).values())
    found = [torch.zeros_like(one) if one.grad is None else one.grad for one in weights]
    for one in weights:
        one.grad = None
    return found


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """The tiny model with two adapters that say something, the policy's and the critic's."""
    adapter = LoRA(r=2, targets=("q_proj", "down_proj"))
    model = load_model(
        Model(path="tuner:tiny"), precision="fp32", device=torch.device("cpu"), adapter=adapter
    )
    torch.manual_seed(0)
    for name, weight in model.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    copy_adapter(model.model, ADAPTER, "critic")
    train_only(model.model, ADAPTER, "critic")
    return model


@pytest.fixture
def roles(loaded) -> Roles:
    head = ScalarHead(torch.randn(1, loaded.transformer.config.hidden_size) / 10, trained=True)
    return Roles({"policy": Role(loaded), "critic": Role(loaded, "critic", head)}, nullcontext)


def known(made: Rollout) -> Rollout:
    """With tokens that the tiny model knows, and without the answers that were truncated."""
    answers = [replace(answer, tokens=answer.tokens % 500) for answer in made.answers]
    return replace(
        made, tokens=[tokens % 500 for tokens in made.tokens], answers=answers, masks_truncated=True
    )


def taken(config: PolicyConfig, roles: Roles) -> tuple[Recorder, Step, Rollout]:
    """One update on the rollout's answers that are not masked."""
    made, algorithm = known(rollout()), algorithm_of(config)
    recorder: Any = Recorder(roles)
    one: Any = One()
    step = Step(
        0, Contents(epoch=0, totals={}), Devices(device="cpu"), recorder, lambda _: None, lambda _: None
    )
    rows = made.rows(1, 48, one)
    rewarded = algorithm.reward(algorithm.observe(roles, rows), SCORES)
    experiences = algorithm.estimate(rewarded, SCORES, one)
    (update,) = updates(made, experiences, None, [], config, one)
    step.totals = update.totals
    algorithm.learn(step, roles, update)
    step.update(*algorithm.trains(0))
    return recorder, step, made


PARTS: dict[str, Any] = {
    "policy": Model(path="tuner:tiny"),
    "reward": "rules.py:gold",
    "prompts": Prompts(files=("a.jsonl",)),
    "kl": 0.0,
}
CONFIGS = {
    "ppo": PPO(**PARTS, critic_from="policy", critic_warmup=0),
    "grpo": GRPO(**PARTS, answers_per_prompt=2),
    "grpo by answers": GRPO(**PARTS, answers_per_prompt=2, normalization="answer"),
    "rloo": RLOO(**PARTS, answers_per_prompt=2),
}


def entropies(loaded: Loaded, made: Rollout, index: int) -> torch.Tensor:
    """Of the distributions that an answer's tokens were sampled from, its prompt before them and no other answer."""
    prompt, answer = made.tokens[index], made.answers[index].tokens
    learned = np.arange(len(prompt) + len(answer)) >= len(prompt)
    batch = make_batch([(np.concatenate([prompt, answer]), learned.astype(np.float32))])
    every = (full_logits(loaded.model, batch) / TEMPERATURE).log_softmax(-1)[batch.learned_N - 1]
    return -(every.exp() * every).sum(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_entropy_bonus_by_autograd(name, loaded, roles):
    """−coefficient times the mean entropy over the tokens of the answers that are not masked, alone and unpacked."""
    config = override(CONFIGS[name], {"sampling.temperature": TEMPERATURE})
    plain, *_ = taken(config, roles)
    bonus, step, made = taken(override(config, {"entropy_bonus": BONUS}), roles)
    kept = [index for index in range(len(made)) if made.answers[index].ended]
    assert 0 < len(kept) < len(made)
    with roles.role("policy", train=True):
        mean = torch.cat([entropies(loaded, made, index) for index in kept]).mean()
        expected = torch.autograd.grad(-BONUS * mean, list(roles.trained("policy").values()))
    (_, with_bonus), (_, without) = bonus.applied[-1], plain.applied[-1]
    for own, other, gradient in zip(with_bonus["policy"], without["policy"], expected, strict=True):
        # a difference of larger gradients, so that single numbers carry their rounding
        assert (own - other - gradient).norm() <= 2e-3 * gradient.norm()
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    assert step.means()["entropy_loss"] == pytest.approx(-mean.item(), rel=1e-5)


def test_the_critic_takes_steps_of_its_own(roles):
    recorder, *_ = taken(override(CONFIGS["ppo"], {"critic_updates": 3}), roles)
    alone, again, together = recorder.applied
    assert [sets for sets, _ in recorder.applied] == [("critic",), ("critic",), ("policy", "critic")]
    plain, *_ = taken(CONFIGS["ppo"], roles)
    ((_, expected),) = plain.applied
    for _, found in (alone, again):  # the recorder steps nothing: each has the critic's gradient and no other
        assert not any(one.abs().max() for one in found["policy"])
        assert torch.allclose(found["critic"][-1], expected["critic"][-1])
    assert torch.allclose(together[1]["critic"][-1], expected["critic"][-1])


def test_returns_by_a_lambda_of_their_own():
    """Advantages stay those of gae_lambda, returns are those of value_gae_lambda; at 1 the rewards that came."""
    config = override(CONFIG, {"gae_lambda": 0.5, "value_gae_lambda": 1.0, "kl": 0.3})
    rewarded = with_rewards(observed_by_token(rollout()), SCORES, config)
    assert isinstance(rewarded[0], Valued)
    one: Any = One()
    found = PPOAlgorithm(config).estimate(rewarded, np.zeros(0), one)
    for row in found:
        expected, _ = advantages(row.rewards_N, row.values_N, row.row.borders, config.gamma, 0.5)
        assert torch.equal(row.advantages_N, expected)
    rewards, returns = (of_answers(name, list(found)) for name in ("rewards_N", "returns_N"))
    for index in range(len(SCORES)):
        assert returns[index] == pytest.approx(np.cumsum(rewards[index][::-1])[::-1], abs=1e-4)
