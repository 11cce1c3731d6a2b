"""Every config that comes with tuner loads at once, goes through JSON and back, is shown, and passes its check."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bounds import LOADING, YARDSTICK
from tests.conftest import ROOT
from tests.end_to_end.conftest import Done
from tuner.config import (
    COOL,
    PolicyConfig,
    SingleModelConfig,
    differences,
    from_json,
    leaves,
    load_config,
    override,
    to_json,
)
from tuner.resources import configs_folder

NAMES = sorted(file.stem for file in configs_folder().glob("*.py"))


def test_the_configs_that_were_promised() -> None:
    assert {
        "quickstart_sft",
        *(f"internlm2_{size}_qlora" for size in ("1_8b", "7b", "20b")),
        *(f"internlm2_7b_{kind}" for kind in ("lora", "full", "pretrain")),
        *("llama3_8b_qlora", "qwen3_8b_qlora", "mistral_7b_qlora"),
        *(f"{name}_long32k" for name in ("internlm2_1_8b", "internlm2_7b", "internlm3_8b", "llama3_8b")),
        *("smollm2_135m_lora", "smollm2_135m_qlora", "smollm2_135m_tickets"),
        "quickstart_reward",
        *(f"internlm2_{size}_reward{kind}" for size in ("1_8b", "7b", "20b") for kind in ("", "_qlora")),
        *("llama3_8b_reward_qlora", "smollm2_135m_reward"),
        *("quickstart_ppo", "smollm2_135m_ppo"),
        *(f"internlm2_{size}_{kind}" for size in ("1_8b", "7b", "20b") for kind in ("ppo", "cool")),
        *("quickstart_cool", "quickstart_cool_people", "smollm2_135m_cool"),
    } <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_json_both_ways(name: str) -> None:
    config = load_config(name)
    again = from_json(to_json(config))
    assert again == config
    assert hash(again) == hash(config)
    assert differences(config, again) == []
    assert override(config, {}) == config
    assert config.name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_a_few_lines_that_say_what_they_are(name: str) -> None:
    text = (configs_folder() / f"{name}.py").read_text(encoding="utf-8")
    module = ast.parse(text)
    lines = len(text.splitlines())
    if isinstance(load_config(name), PolicyConfig | COOL):  # four parts, and perhaps a rule of the user's own
        functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
        lines -= sum((node.end_lineno or 0) - node.lineno + 1 for node in functions)
        assert lines <= 42
    else:
        assert lines <= 25
    assert (ast.get_docstring(module) or "").endswith(".")


def test_they_are_listed_with_the_first_line_of_their_docstring(tuner: Callable[..., Done]) -> None:
    lines = tuner("configs").out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    for name, line in zip(NAMES, lines, strict=True):
        module = ast.parse((configs_folder() / f"{name}.py").read_text(encoding="utf-8"))
        first = (ast.get_docstring(module) or "").splitlines()[0]
        assert first
        assert line.endswith(f"  {first}")


@pytest.mark.parametrize("name", NAMES)
def test_show_and_check(tuner: Callable[..., Done], name: str) -> None:
    shown = tuner("show", name)
    assert (shown.code, shown.err) == (0, "")
    assert len(shown.out.splitlines()) == len(list(leaves(load_config(name))))
    told = json.loads(tuner("show", name, "--json", cwd=Path.cwd()).out)  # functions are named from here
    assert from_json(json.dumps(told["config"])) == load_config(name)
    checked = tuner("check", name, "--tiny", "--json")
    assert (checked.code, checked.err) == (0, "")
    found = json.loads(checked.out)
    config = load_config(name)
    if isinstance(config, COOL):
        config = config.policy
    assert isinstance(config, SingleModelConfig | PolicyConfig)
    model = config.policy if isinstance(config, PolicyConfig) else config.model
    assert found["steps"] >= 1
    assert found["trained"] > 0
    assert found["peak_gib"] > 0
    assert (model.path in found["replaced"]) == (model.path != "tuner:tiny")
    family = name.split("_")[0]
    if model.path.startswith("runs/quickstart"):
        family = "smollm2"  # what a stand-in is for a name that tells no family
    others = {"quickstart": "internlm2", "polar": "internlm2", "internlm3": "llama", "llama3": "llama"}
    expected = (others | {"smollm2": "llama"}).get(family, family)
    assert found["family"].lower().startswith(expected)


@pytest.mark.parametrize("name", NAMES)
def test_memory_needs_no_network(tuner: Callable[..., Done], name: str) -> None:
    """In an empty folder: models, runs and rows are missing, but for what is embedded."""
    checked = tuner("check", name, "--memory", "--json")
    assert (checked.code, checked.err) == (0, "")
    found = json.loads(checked.out)
    assert found["peak_gib"] > 0
    sizes = {"1_8b": 1.9e9, "7b": 7.7e9, "20b": 19.9e9}
    size = next((sizes[size] for size in sizes if size in name), None)
    if name.startswith("internlm2") and size is not None:  # reward models have no head of the vocabulary
        assert found["parameters"] == pytest.approx(size, rel=0.11)
    assert bool(found["unchecked"]) == bool(found["shapes"])
    assert bool(found["steps"]) == (not found["unchecked"])


def test_memory_in_words_without_a_model(tuner: Callable[..., Done]) -> None:
    done = tuner("check", "internlm2_7b_ppo", "--memory")
    assert done.code == 0
    lines = done.out.splitlines()
    assert "ready to train" not in lines
    shapes = [line for line in lines if line.startswith("shape:")]
    assert [line.split(": ")[-1] for line in shapes] == [
        "its shape as it ships with tuner",
        "the shape that the config internlm2_7b_reward_qlora would give it",
    ]
    assert lines[-1].startswith("missing: internlm/internlm2-chat-7b-sft: neither a folder here")
    assert lines[-1].endswith("only memory was estimated, and nothing else was checked")


def test_check_in_words(tuner: Callable[..., Done]) -> None:
    done = tuner("check", "internlm2_7b_qlora", "--tiny", "--memory")
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[:-1] if not line.startswith(" ")] == [
        "model:",
        "adapter:",
        "nf4:",
        "rope:",
        "data:",
        "plan:",
        "memory:",
        "card:",
        "tiny:",
    ]
    assert lines[-1] == "ready to train"
    parts = [line.split(maxsplit=3) for line in lines if line.startswith(" ")]
    assert {unit for _, unit, _, _ in parts} == {"GiB"}
    shares = [int(share.rstrip("%")) for _, _, share, _ in parts]
    assert shares == sorted(shares, reverse=True)
    assert 95 <= sum(shares) <= 103


def test_what_a_card_holds(tuner: Callable[..., Done]) -> None:
    """All weights of 7B need more than 80 GiB, LoRA less than 24 GiB, and with NF4 less than 12 GiB."""
    lines = tuner("check", "internlm2_7b_full", "--card", "80").out.splitlines()
    assert any(line.startswith("card:    80 GiB: ") and "too little" in line for line in lines)
    lines = tuner("check", "internlm2_7b_lora", "--card", "24").out.splitlines()
    assert any(line.startswith("card:    24 GiB: it fits, with ") for line in lines)
    lines = tuner("check", "internlm2_7b_lora", "--card", "12").out.splitlines()
    assert any(line.endswith("enough would be model.quantization=nf4") for line in lines)
    assert any(line.startswith("saves:   each alone: model.quantization=nf4 ") for line in lines)


def test_loading_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    """In Python calls, relative to a yardstick of the same process, from pydantic's own import on."""
    code = YARDSTICK + (
        "import json, sys\n"
        "def load(name):\n"
        "    from tuner.config import load_config\n"
        "    load_config(name)\n"
        "loads = {name: calls(lambda: load(name)) for name in sys.argv[1:]}\n"
        "print(json.dumps([loads, calls(yardstick), sorted(sys.modules)]))\n"
    )
    # A config of one stage first: it is charged with importing tuner.config, and one of rounds with all its stages.
    names = sorted(NAMES, key=lambda name: name.endswith("_cool"))
    command = [sys.executable, "-c", code, *names]
    output = subprocess.check_output(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    loads, yardstick, modules = json.loads(output)
    assert max(loads.values()) / yardstick < LOADING, "the first is charged with importing tuner.config"
    heavy = {"torch", "transformers", "numpy", "datasets", "peft", "accelerate", "wandb", "rich", "typer"}
    assert not heavy & {module.partition(".")[0] for module in modules}
