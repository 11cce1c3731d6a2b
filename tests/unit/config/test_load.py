"""Config files to values and back: what a user writes, and what a user gets wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bounds import LOADING, YARDSTICK
from tuner.config import (
    SFT,
    AdamW,
    Chat,
    Constant,
    LoRA,
    Model,
    Source,
    differences,
    from_json,
    leaves,
    load_config,
    override,
    to_json,
)  # fmt: skip
from tuner.errors import UserError

GOOD = SFT(
    name="good",
    model=Model(path="tuner:tiny", quantization="nf4"),
    adapter=LoRA(r=8),
    data=Chat(files=("a.jsonl", Source(path="b.jsonl", weight=2.0)), max_length=64),
    tokens_per_step=128,
    tokens_per_pass=64,
)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(text)
    return file


HEAD = "from tuner.config import SFT, Chat, LoRA, Model\n"
BODY = 'config = SFT(model=Model(path="tuner:tiny"), data=Chat(files=("a.jsonl",)))\n'


def test_a_file_becomes_a_value_named_after_it(tmp_path):
    config = load_config(write(tmp_path, HEAD + BODY))
    assert config.name == "mine"
    assert config.model.path == "tuner:tiny"


def test_a_config_may_build_on_its_neighbour_and_is_read_anew(tmp_path):
    (tmp_path / "base.py").write_text(HEAD + BODY)
    file = write(tmp_path, 'from base import config as base\nfrom tuner.config import override\n'
                           'config = override(base, {"optimizer.lr": 1e-3})\n')  # fmt: skip
    assert load_config(file).optimizer.lr == 1e-3
    (tmp_path / "base.py").write_text(HEAD + BODY.replace("tuner:tiny", "other"))
    assert load_config(file).model.path == "other"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a config file ends with `config = SFT"),
        (HEAD + "config = 3\n", "found an object of type int"),
        (HEAD + "x = 1 / 0\n", "mine.py:2: ZeroDivisionError"),
        (HEAD + "def f(:\n", "mine.py:2: not valid Python"),
        (
            HEAD + BODY.replace("model=", "modle="),
            "mine.py:2: SFT has no field 'modle'; did you mean 'model'?",
        ),
        (HEAD + BODY.replace('("a.jsonl",)', '"a.jsonl"'), r"Chat.files: write a tuple, as in ('a.jsonl',)"),
        (HEAD + BODY.replace("tuner:tiny", ""), "Model.path: "),
        (HEAD + BODY.replace('files=("a.jsonl",)', ""), "Chat.files: is required"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, text, said):
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text))
    assert said in str(error.value)


def test_a_missing_file_suggests_a_named_config():
    with pytest.raises(UserError, match="did you mean quickstart_sft"):
        load_config("quickstart_stf.py")
    assert load_config("quickstart_sft").name == "quickstart_sft"


def test_json_both_ways():
    assert from_json(to_json(GOOD)) == GOOD
    assert to_json(from_json(to_json(GOOD))) == to_json(GOOD)


def test_override_takes_text_and_values_alike():
    by_text = override(GOOD, ["optimizer.lr=1e-4", "adapter.r=16", "data.limit=5"])
    by_value = override(GOOD, {"optimizer.lr": 1e-4, "adapter.r": 16, "data.limit": 5})
    assert by_text == by_value
    assert by_text.optimizer == AdamW(lr=1e-4)
    assert override(GOOD, {"schedule": Constant()}).schedule == Constant()
    assert override(GOOD, ["data.files.1.weight=3.0"]).data.sources[1].weight == 3.0
    assert GOOD.adapter.r == 8  # the value itself never changes


@pytest.mark.parametrize(
    ("change", "said"),
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
        ("evaluation.keep_best=true", "need validation rows"),
        ('data.split={"validation": 0.6, "test": 0.5}', "leaves nothing to train on"),
        ('data.files=["a", {"path": "b", "share": 1.0}]', "give every source a share, or none of them"),
        ("name=../up", "name: "),
    ],
)
def test_wrong_overrides_are_one_clear_sentence(change, said):
    with pytest.raises(UserError) as error:
        override(GOOD, [change])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_differences_name_the_leaves():
    other = override(GOOD, {"optimizer.lr": 1e-4, "adapter.r": 4})
    assert differences(GOOD, other) == [("optimizer.lr", 2e-4, 1e-4), ("adapter.r", 8, 4)]
    assert differences(GOOD, GOOD) == []


def test_every_leaf_says_what_it_means():
    assert all(leaf.meaning for leaf in leaves(GOOD))


def test_a_value_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        GOOD.seed = 3


def to_messages(row: dict) -> dict:
    return {"messages": row["turns"]}


def test_functions_are_kept_by_name_and_lambdas_refused():
    source = Source(path="a.jsonl", shape=to_messages)
    assert source.shape == "tests/unit/config/test_load.py:to_messages"
    with pytest.raises(ValueError, match="lambdas cannot be saved"):
        Source(path="a.jsonl", shape=lambda row: row)


def test_loading_is_quick_and_imports_no_torch():
    """In yardsticks of the same process, of which each try has its own."""
    code = YARDSTICK + (
        "import sys\nstart = time.process_time()\n"
        "from tuner.config import load_config\n"
        "load_config('configs/quickstart_sft.py')\n"
        "print((time.process_time() - start) / yardstick())\n"
        "assert not {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
    )
    ratios = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(ratios) < LOADING
