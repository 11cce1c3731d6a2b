"""Loading, overriding and serializing configs, and the messages for invalid ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bounds import LOADING, YARDSTICK
from tuner.config import (
    GRPO,
    PPO,
    RLOO,
    SFT,
    AdamW,
    AdaptiveKL,
    Chat,
    Constant,
    LoRA,
    Model,
    Preferences,
    Prompts,
    RewardModel,
    Round,
    Source,
    differences,
    from_json,
    leaves,
    load_config,
    override,
    to_json,
)  # fmt: skip
from tuner.errors import UserError

CONFIG = SFT(
    name="good",
    model=Model(path="tuner:tiny", quantization="nf4"),
    adapter=LoRA(r=8),
    data=Chat(files=("a.jsonl", Source(path="b.jsonl", weight=2.0)), max_length=64),
    tokens_per_step=128,
    tokens_per_pass=64,
)


def config_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(text)
    return file


IMPORTS = "from tuner.config import SFT, Chat, LoRA, Model\n"
ASSIGNMENT = 'config = SFT(model=Model(path="tuner:tiny"), data=Chat(files=("a.jsonl",)))\n'


def test_a_config_is_named_after_its_file(tmp_path):
    config = load_config(config_file(tmp_path, IMPORTS + ASSIGNMENT))
    assert config.name == "mine"
    assert config.model.path == "tuner:tiny"


def test_a_config_may_import_its_neighbor_and_is_reread(tmp_path):
    (tmp_path / "base.py").write_text(IMPORTS + ASSIGNMENT)
    file = config_file(tmp_path, 'from base import config as base\nfrom tuner.config import override\n'
                           'config = override(base, {"optimizer.lr": 1e-3})\n')  # fmt: skip
    assert load_config(file).optimizer.lr == 1e-3
    (tmp_path / "base.py").write_text(IMPORTS + ASSIGNMENT.replace("tuner:tiny", "other"))
    assert load_config(file).model.path == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a config file ends with `config = SFT"),
        (IMPORTS + "config = 3\n", "found an object of type int"),
        (IMPORTS + "x = 1 / 0\n", "mine.py:2: ZeroDivisionError"),
        (IMPORTS + "def f(:\n", "mine.py:2: not valid Python"),
        (
            IMPORTS + ASSIGNMENT.replace("model=", "modle="),
            "mine.py:2: SFT has no field 'modle'; did you mean 'model'?",
        ),
        (
            IMPORTS + ASSIGNMENT.replace('("a.jsonl",)', '"a.jsonl"'),
            r"Chat.files: write a tuple, as in ('a.jsonl',)",
        ),
        (IMPORTS + ASSIGNMENT.replace("tuner:tiny", ""), "Model.path: "),
        (IMPORTS + ASSIGNMENT.replace('files=("a.jsonl",)', ""), "Chat.files: is required"),
    ],
)
def test_an_invalid_file_is_reported_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        load_config(config_file(tmp_path, text))
    assert message in str(error.value)


def test_a_missing_file_suggests_a_named_config():
    with pytest.raises(UserError, match="did you mean quickstart_sft"):
        load_config("quickstart_stf.py")
    assert load_config("quickstart_sft").name == "quickstart_sft"


def test_json_round_trip():
    assert from_json(to_json(CONFIG)) == CONFIG
    assert to_json(from_json(to_json(CONFIG))) == to_json(CONFIG)


def test_overrides_from_text_and_from_values_are_equal():
    from_text = override(CONFIG, ["optimizer.lr=1e-4", "adapter.r=16", "data.limit=5"])
    from_values = override(CONFIG, {"optimizer.lr": 1e-4, "adapter.r": 16, "data.limit": 5})
    assert from_text == from_values
    assert from_text.optimizer == AdamW(lr=1e-4)
    assert override(CONFIG, {"schedule": Constant()}).schedule == Constant()
    assert override(CONFIG, ["data.files.1.weight=3.0"]).data.sources[1].weight == 3.0
    assert CONFIG.adapter.r == 8  # the original is unchanged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer", "write key=value"),
        ("optimzer.lr=1", "did you mean 'optimizer'?"),
        ("optimizer.l=1", "did you mean 'lr'?"),
        ("optimizer.lr=fast", "optimizer.lr: input should be a valid number, not 'fast'"),
        ("optimizer.lr=-1", "optimizer.lr: input should be greater than 0, not -1"),
        ("max_steps=0", "max_steps: "),
        ("max_steps=2.5", "max_steps: "),
        ("freeze.names=('a',)", "freeze is None, which has no 'names'; set it whole"),
        ("freeze={}", "freezes nothing"),
        ("data.files.7.weight=1", "there are: 0, 1"),
        ("adapter=null", "can only train an adapter: add adapter=LoRA()"),
        ("tokens_per_pass=256", "tokens_per_pass (256) is more than tokens_per_step (128)"),
        ("data.max_length=100", "data.max_length (100) is more than tokens_per_pass (64)"),
        ('model.rope={"scaling": "yarn"}', "write scaling and factor together"),
        ('model.rope={"factor": 2.0}', "factor has no effect without scaling"),
        ('model.rope={"length": 64}', "write a new base, or scaling, beside it"),
        ('model.rope={"scaling": "yarn", "factor": 2.0, "length": 64}', "scaling and length, as in"),
        ('model.rope={"scaling": "longrope", "factor": 2.0}', "needs long_factors"),
        ('model.rope={"base": 1e6, "long_factors": [1.0]}', "needs long_factors, which only it reads"),
        (
            'model.rope={"scaling": "dynamic", "factor": 2.0, "mixed_window": true}',
            "keeps short rows as they were",
        ),
        ('model.rope={"base": 1e6, "mixed_window": true}', "needs a target for long rows"),
        ("evaluation.keep_best=true", "need validation rows"),
        ('data.split={"validation": 0.6, "test": 0.5}', "leaves nothing to train on"),
        ('data.files=["a", {"path": "b", "share": 1.0}]', "give every source a share, or none of them"),
        ("name=../up", "name: "),
    ],
)
def test_an_invalid_override_is_one_sentence(change, message):
    with pytest.raises(UserError) as error:
        override(CONFIG, [change])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


REWARD = RewardModel(
    name="reward",
    model=Model(path="tuner:tiny"),
    conditions={"text": "Be right."},
    data=Preferences(files=("a",)),
)


@pytest.mark.parametrize(
    ("config", "changes", "path"),
    [
        (REWARD, {"conditions": {"text": 3}}, "override: conditions.text: "),
        (REWARD, {"conditions": {"chat": ["a", 1]}}, "override: conditions.chat.1: "),
        (REWARD, {"data.files": ["a.jsonl", {"path": 3}]}, "override: data.files.1.path: "),
        (CONFIG, {"data.files": [3]}, "override: data.files.0: "),
        (CONFIG, {"data": {"kind": "text", "files": ["a"], "max_length": 0}}, "override: data.max_length: "),
        (CONFIG, {"schedule": {"kind": "linear", "warmup": "a"}}, "override: schedule.warmup: "),
        (CONFIG, {"schedule": {"kind": "steep"}}, "override: schedule: "),
        (CONFIG, {"evaluation.score": 3}, "override: evaluation.score: 3 is not a function"),
        (CONFIG, {"adapter.targets": "q_proj"}, "override: adapter.targets: "),
    ],
)
def test_the_path_of_an_error_is_the_users(config, changes, path):
    """Without pydantic's names for the members of a union, and with a user's that are the same words."""
    with pytest.raises(UserError) as error:
        override(config, changes)
    assert str(error.value).startswith(path)


@pytest.mark.parametrize("evaluation", [{}, {"rule": "rules.py:gold", "rule_on_rollouts": False}])
def test_an_alarm_that_acts_on_gold_needs_a_gold_score(evaluation: dict[str, object]):
    values = {"policy": "a", "reward": "b", "prompts": Prompts(files=("c",), test_files=("d",))}
    assert PPO(**values, evaluation=evaluation).alarms.exploits == "warn"
    with pytest.raises(
        ValueError, match=r"alarms\.exploits='stop' needs a gold score of the rollouts: add evaluation"
    ):
        PPO(**values, evaluation=evaluation, alarms={"exploits": "stop"})
    with pytest.raises(ValueError, match="'warn', 'stop' or 'roll_back'"):
        PPO(**values, alarms={"kl": "shout"})


def test_grpo_takes_no_estimator_without_a_gradient():
    """Σ p · ∇ log p = 0, whatever p: as a term of the loss, k1 does nothing."""
    parts = {
        "policy": Model(path="tuner:tiny"),
        "reward": "rules.py:gold",
        "prompts": Prompts(files=("a.jsonl",)),
    }
    config = GRPO(**parts, kl=0.1)
    with pytest.raises(
        UserError, match=r'kl_estimator: the gradient of "k1" in a loss .* write "k2" or "k3"'
    ):
        override(config, ["kl_estimator=k1"])
    assert override(config, ["kl_estimator=k2"]).kl_estimator == "k2"
    assert RLOO(**parts, kl_estimator="k1").kl_estimator == "k1"  # in the reward, which is not differentiated


def test_an_adaptive_coefficient_beside_a_plain_one():
    config = GRPO(
        policy=Model(path="tuner:tiny"),
        reward="rules.py:gold",
        prompts=Prompts(files=("a.jsonl",)),
        kl=AdaptiveKL(target=6.0),
    )
    assert from_json(to_json(config)) == config
    assert override(config, ["kl.target=3", "kl.initial=0.1"]).kl == AdaptiveKL(target=3.0, initial=0.1)
    assert override(config, ["kl=0.2"]).kl == 0.2
    for change, message in {
        "kl=-1": "override: kl: input should be greater than or equal to 0, not -1",
        "kl.target=0": "override: kl.target: input should be greater than 0, not 0",
        "kl.horizon=511": r"kl.horizon (511) is less than the answers of a step (512)",
    }.items():
        with pytest.raises(UserError) as error:
            override(config, [change])
        assert message in str(error.value)


def test_differences_name_the_leaves():
    changed = override(CONFIG, {"optimizer.lr": 1e-4, "adapter.r": 4})
    assert differences(CONFIG, changed) == [("optimizer.lr", 2e-4, 1e-4), ("adapter.r", 8, 4)]
    assert differences(CONFIG, CONFIG) == []


def test_differences_name_what_differs_in_a_list():
    """And not the whole list: a run of rounds that is refused would print all of them."""
    config = load_config("quickstart_cool")
    changed = override(config, {"rounds.1.steps": 7, "rounds.1.patch.average": [0.5]})
    steps, average = differences(config, changed)
    assert steps == ("rounds.1.steps", config.rounds[1].steps, 7)
    assert average == ("rounds.1.patch.average.0", None, 0.5)
    longer = override(config, {"rounds": [*config.rounds, Round(steps=9)]})
    ((path, old, new),) = differences(config, longer)
    assert (path, old, new["steps"]) == ("rounds.2", None, 9)
    assert differences(longer, config) == [(path, new, old)]


def test_every_leaf_has_a_meaning():
    assert all(leaf.meaning for leaf in leaves(CONFIG))


def test_configs_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        CONFIG.seed = 3


def to_messages(row: dict) -> dict:
    return {"messages": row["turns"]}


def test_functions_are_stored_by_name_and_lambdas_rejected():
    source = Source(path="a.jsonl", shape=to_messages)
    assert source.shape == "tests/unit/config/test_load.py:to_messages"
    with pytest.raises(ValueError, match="lambdas cannot be saved"):
        Source(path="a.jsonl", shape=lambda row: row)


def test_loading_is_fast_and_imports_no_torch():
    """In Python calls, relative to a yardstick of the same process."""
    code = YARDSTICK + (
        "import sys\n"
        "def load():\n"
        "    from tuner.config import load_config\n"
        "    load_config('configs/quickstart_sft.py')\n"
        "print(calls(load) / calls(yardstick))\n"
        "assert not {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
    )
    assert float(subprocess.check_output([sys.executable, "-c", code])) < LOADING


@pytest.mark.parametrize(
    "change",
    ["optimizer.betas=[1.5,0.999]", "optimizer.betas=[0.9,1.0]", "adapter.targets=[]", f"seed={2**64}"],
)
def test_values_that_no_training_can_have_are_refused(change):
    with pytest.raises(UserError, match=re.escape(change.split("=")[0].split(".")[-1])):
        override(CONFIG, [change])
