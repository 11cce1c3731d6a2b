"""Config of a reward model: its checks, and JSON round trips."""

import pytest
from pydantic import ValidationError

from tuner.config import (
    AdamW,
    Chat,
    Cosine,
    FocalRanking,
    LoRA,
    Model,
    PairEvaluation,
    Preferences,
    RewardModel,
    Source,
    Split,
    Text,
    differences,
    from_json,
    load_config,
    override,
    to_json,
)
from tuner.errors import UserError

DATA = Preferences(files=(Source(path="pairs.jsonl", condition="brief", weight=2.0), "others.jsonl"))
CONDITIONS = {"brief": "tuner:twins/brief.txt", "kind": ("Be kind.", "Be nice."), "plain": "One text."}


def reward(**fields) -> RewardModel:
    return RewardModel(**{"model": Model(path="tuner:tiny"), "data": DATA, "conditions": CONDITIONS} | fields)


def test_defaults_are_the_papers():
    config = RewardModel(model=Model(path="x"), data=Preferences(files=("a.jsonl",)))
    assert (config.loss.gamma, config.loss.bound, config.loss.barrier) == (2.0, 5.0, 0.02)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-5, 0.01)
    assert isinstance(config.schedule, Cosine)
    assert config.schedule.final * config.optimizer.lr == pytest.approx(5e-6)
    assert config.tokens_per_step == 16_384
    assert config.epochs == 1.0
    assert config.reward_token == "[UNUSED_TOKEN_130]"
    assert config.conditions == {}


def test_json_round_trip_with_conditions():
    config = reward(
        name="mine",
        model=Model(path="tuner:tiny", quantization="nf4"),
        adapter=LoRA(r=8),
        reward_token=None,
        loss=FocalRanking(gamma=0.0, penalty="square", barrier=0.0, margin=0.0),
        evaluation=PairEvaluation(worst=3),
    )
    restored = from_json(to_json(config))
    assert restored == config
    assert restored.conditions["kind"] == ("Be kind.", "Be nice.")
    assert not differences(config, restored)
    assert hash(restored) == hash(config)


def test_configs_with_dicts_are_hashable():
    assert hash(reward()) == hash(reward())
    assert len({reward(), reward(), reward(conditions={"brief": "Other."})}) == 2
    assert len({reward(conditions={}), reward(conditions={}, seed=1)}) == 2


def test_the_hash_is_independent_of_the_order_of_conditions():
    reordered = reward(conditions=dict(reversed(CONDITIONS.items())))
    assert reordered == reward()
    assert hash(reordered) == hash(reward())


def test_lists_of_wordings_become_tuples():
    assert reward(conditions={"kind": ["a", "b"]}).conditions == {"kind": ("a", "b")}


def test_overrides_reach_conditions_and_loss():
    config = override(
        reward(), {"conditions.plain": "Another.", "loss.gamma": 1.0, "conditions.new": ["a", "b"]}
    )
    assert config.conditions == {**CONDITIONS, "plain": "Another.", "new": ("a", "b")}
    assert config.loss.gamma == 1.0


def test_a_config_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from tuner.config import Model, Preferences, RewardModel\n"
        'config = RewardModel(model=Model(path="tuner:tiny"), data=Preferences(files=("a.jsonl",)))\n'
    )
    assert isinstance(load_config(file), RewardModel)
    file.write_text(file.read_text().replace("files=", "max_length=9000, files="))
    with pytest.raises(UserError, match=r"mine\.py:2: .*a pair is never split"):
        load_config(file)


INVALID = {
    "pair over pass": (
        {"data": Preferences(files=("a.jsonl",), max_length=65), "tokens_per_pass": 129},
        r"two answers of data\.max_length \(65\) are more than tokens_per_pass \(129\).*first to 64 .*second to 130",
    ),
    "pass over step": ({"tokens_per_step": 8192}, "tokens_per_pass .* is more than tokens_per_step"),
    "empty text": ({"conditions": {"a": " "}}, "conditions: 'a' has no text"),
    "no wordings": ({"conditions": {"a": ()}}, "conditions: 'a' has no text"),
    "one empty wording": ({"conditions": {"a": ("x", "")}}, "conditions: 'a' has no text"),
    "empty name": ({"conditions": {"": "x"}}, "conditions: '' has no text"),
    "wording that is not a text": ({"conditions": {"a": 3}}, "conditions"),
    "quantized without adapter": (
        {"model": Model(path="x", quantization="nf4")},
        "'nf4' can only train an adapter",
    ),
    "best without validation": ({"evaluation": PairEvaluation(keep_best=True)}, "need validation rows"),
    "other data": ({"data": Chat(files=("a.jsonl",))}, "Preferences"),
    "unknown field": ({"lambda_": 0.02}, "has no field 'lambda_'"),
    "misspelled": ({"reward_tokens": "x"}, "did you mean 'reward_token'"),
}


@pytest.mark.parametrize("case", INVALID)
def test_inconsistent_configs_are_rejected(case):
    fields, message = INVALID[case]
    with pytest.raises(ValidationError, match=message):
        reward(**fields)


def test_two_answers_that_just_fit_are_accepted():
    data = Preferences(files=("a.jsonl",), max_length=64)
    assert reward(data=data, tokens_per_pass=128).tokens_per_pass == 128


@pytest.mark.parametrize("fields", [{"gamma": -1.0}, {"bound": 0.0}, {"barrier": -0.1}, {"margin": -1.0}])
def test_loss_settings_out_of_range_are_rejected(fields):
    with pytest.raises(ValidationError):
        FocalRanking(**fields)


@pytest.mark.parametrize("kind", [Chat, Text])
def test_only_preferences_and_prompts_support_conditions(kind):
    message = r"b\.jsonl has a condition, which only preferences and prompts have; leave it out"
    for field in ("files", "validation_files", "test_files"):
        fields = {"files": ("a.jsonl",)} | {field: (Source(path="b.jsonl", condition="brief"),)}
        with pytest.raises(ValidationError, match=message):
            kind(**fields)
    assert Preferences(files=(Source(path="b.jsonl", condition="brief"),)).sources[0].condition == "brief"


def test_validation_rows_allow_keep_best():
    config = reward(
        data=Preferences(files=("a.jsonl",), split=Split(validation=0.1)),
        evaluation=PairEvaluation(keep_best=True, patience=2),
        optimizer=AdamW(lr=1e-4),
    )
    assert config.evaluation.keep_best
