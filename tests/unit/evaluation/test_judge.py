"""Held-out prompts: what was answered, what a reward model and a rule say of it, and whose fault a failure is."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from tests.unit.evaluation.test_win_rate import prompts_of
from tuner.config import PPO, Model, PolicyEvaluation, Prompts, Sampling
from tuner.errors import UserError
from tuner.evaluation.judge import Judge, JudgedAnswers, answer_held_out
from tuner.models.generate import Answer, uniforms
from tuner.rollout import engine, reward_sources
from tuner.rollout.engine import LocalEngine
from tuner.rollout.reward_sources import ModelReward
from tuner.rollout.rules import load_rule
from tuner.training.devices import Devices

CONFIG = PPO(
    policy=Model(path="tuner:tiny"),
    reward="tuner:tiny",  # type: ignore[arg-type]
    prompts=Prompts(files=("rows.jsonl",)),
    sampling=Sampling(max_new_tokens=4),
    device="cpu",
    precision="fp32",
)
PROMPTS = prompts_of([("a", "polite"), ("b", None), ("c", "json"), ("d", "polite")])


class RewardInputs:
    """Stands for the reward model's words: what is asked, as it is."""

    template = SimpleNamespace(needs_reference=False)

    def make(self, requests):
        return [
            (request.prompt[0].content, request.conversation.turns[-1].content, request.condition)
            for request in requests
        ]


@pytest.fixture
def scene(monkeypatch):
    """Roles whose policy says its prompt's number, and whose reward model scores it; what generation was given."""
    received = {}

    def generate(model, prompts, **settings):
        received.update(settings, prompts=prompts)
        ended = [place % 2 == 0 for place in range(len(prompts))]
        tokens = [[10 + place, 2] if end else [10 + place] * 4 for place, end in enumerate(ended)]
        return [
            Answer(np.array(ids, np.int32), end, np.zeros(len(ids), np.float32))
            for ids, end in zip(tokens, ended, strict=True)
        ]

    def score(model, sequences, tokens_per_pass, device, **by_pass):
        received["scored"] = sequences
        return np.arange(float(len(sequences)))

    monkeypatch.setattr(engine, "generate", generate)
    monkeypatch.setattr(reward_sources, "score_sequences", score)
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
    roles = SimpleNamespace(role=nullcontext, whole=nullcontext, tokenizer=tokenizer)
    return roles, Devices.of(CONFIG), received


def answered(roles, devices, config=CONFIG):
    """Answers to the prompts, as a config says."""
    local = LocalEngine(roles, {2}, config.sampling, config.seed, config.tokens_per_pass, devices)
    return answer_held_out(PROMPTS, local, roles.tokenizer, config.evaluation.temperature)


def judge(roles, devices, rule=None) -> Judge:
    reward = ModelReward(roles, RewardInputs(), CONFIG.tokens_per_pass, devices)  # type: ignore[arg-type]
    return Judge(PROMPTS, reward, rule, "rules.py:gold", devices)


def test_answers_are_texts_without_their_end_but_with_its_length(scene):
    roles, devices, received = scene
    policy_answers = answered(roles, devices)
    assert list(policy_answers.texts) == ["10", "11 11 11 11", "12", "13 13 13 13"]
    assert policy_answers.ended_A.tolist() == [True, False, True, False]
    assert policy_answers.lengths_A.tolist() == [2, 4, 2, 4]
    assert received["prompts"] == [[0, 1, 2]] * 4
    assert received["noise"] is None, "greedy"


def test_noise_depends_on_seed_and_prompt_alone(scene):
    roles, devices, received = scene
    warm = CONFIG.model_copy(update={"evaluation": PolicyEvaluation(temperature=0.7), "seed": 3})
    answered(roles, devices, warm)
    assert received["temperature"] == 0.7
    assert np.array_equal(received["noise"], uniforms(3, 0, [0, 1, 2, 3], 4))


def test_scores_are_asked_under_each_prompts_condition(scene):
    roles, devices, received = scene
    judged = judge(roles, devices).judge(["w", "x", "y", "z"])
    assert received["scored"] == [
        ("a", "w", "polite"),
        ("b", "x", None),
        ("c", "y", "json"),
        ("d", "z", "polite"),
    ]
    assert judged.scores_A.tolist() == [0, 1, 2, 3]
    assert judged.golds_A is None
    assert judged.means() == {"score": 1.5, "score/polite": 1.5, "score/json": 2.0}


def test_asking_is_answering_and_judging(scene):
    roles, devices, _ = scene
    policy_answers = answered(roles, devices)
    judged = judge(roles, devices, rule=lambda answer, row: float("11" in answer)).judge(policy_answers.texts)
    assert list(judged.answers) == ["10", "11 11 11 11", "12", "13 13 13 13"]
    assert judged.golds_A is not None
    assert judged.golds_A.tolist() == [0, 1, 0, 0]
    assert judged.means()["gold"] == 0.25
    assert judged.means()["gold/polite"] == 0.0


def test_a_rule_that_fails_is_said_with_the_row(scene):
    roles, devices, _ = scene
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: evaluation\.rule .* failed on 'w' \(KeyError"):
        judge(roles, devices, rule=lambda answer, row: row["no such key"]).judge(list("wxyz"))


def test_conditions_are_those_that_occur():
    conditions = JudgedAnswers(PROMPTS, list("wxyz"), np.zeros(4), None).conditions()
    assert {name: chosen.tolist() for name, chosen in conditions.items()} == {
        "polite": [True, False, False, True],
        "json": [False, False, True, False],
    }


def test_rules_by_name(tmp_path):
    assert load_rule(None, "evaluation.rule") is None
    file = tmp_path / "rule.py"
    file.write_text("def gold(answer, row):\n    return 1.0\n")
    rule = load_rule(f"{file}:gold", "evaluation.rule")
    assert rule is not None
    assert rule("", {}) == 1.0
    with pytest.raises(UserError, match="no such file"):
        load_rule(f"{tmp_path}/none.py:gold", "evaluation.rule")
