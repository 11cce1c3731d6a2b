"""Three of the changes of docs/extending.md, carried out by the code that stands there, in a package of its own."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

import tuner
from tests.conftest import ROOT
from tests.shallow_models import shallow
from tuner.config import Chat, Model, PolicyEvaluation, Prompts, Sampling, override
from tuner.stages.data_view import load_rows
from tuner.stages.run import Run

RULE = "def length(answer, row):\n    return 1 / (1 + len(answer))\n"


def code_blocks() -> dict[str, str]:
    """File name -> text of the code blocks that begin with a comment naming one."""
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, flags=re.DOTALL))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples as a package on Python's path; every import of it is forgotten afterwards."""
    folder = tmp_path / "extension"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name, text in code_blocks().items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "extension":
            del sys.modules[name]


def sft(path: Path) -> tuner.config.SFT:
    from tuner.config import SFT

    return SFT(
        name="sft",
        model=Model(path=shallow(1)),
        data=Chat(files=(str(path),), template="internlm2", max_length=64),
        tokens_per_step=128,
        tokens_per_pass=128,
        max_steps=2,
        precision="fp32",
    )


def test_the_examples_are_those_of_the_page() -> None:
    assert code_blocks().keys() == {"shapes.py", "reinforce.py", "tracker.py"}


@pytest.mark.usefixtures("_own_registrations")
def test_a_row_shape(package: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"faq": "What is 1 + 1?", "reply": "2"}\n')
    with pytest.raises(tuner.UserError, match=r"rows\.jsonl:1: this row's shape is unknown"):
        load_rows(sft(rows))
    importlib.import_module("extension.shapes")
    config = sft(rows)
    assert len(load_rows(config).train) == 1
    named = override(config, {"data.files": [{"path": str(rows), "shape": "faq"}]})
    assert load_rows(named).fingerprint == load_rows(config).fingerprint


def test_a_tracker(package: Path, tmp_path: Path) -> None:
    tracker = importlib.import_module("extension.tracker")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n}?", "completion": "{n}"}}\n' for n in range(40)))
    run = tuner.train(sft(rows), runs=tmp_path, watchers=[tracker.CsvTracker("losses.csv")])
    head, *lines = Path("losses.csv").read_text().splitlines()
    assert head == "step,loss"
    assert lines == [f"{record['step']},{record['loss']}" for record in run.metrics]


@pytest.mark.usefixtures("_own_registrations")
def test_an_algorithm(package: Path, tmp_path: Path) -> None:
    """It trains, is shown, saved, opened from its JSON, and measured again."""
    reinforce = importlib.import_module("extension.reinforce")
    (tmp_path / "rules.py").write_text(RULE)
    config = reinforce.Reinforce(
        name="reinforce",
        policy=Model(path=shallow(1)),
        adapter=tuner.config.LoRA(r=4),
        reward="rules.py:length",
        prompts=Prompts(
            files=("tuner:sums/train.jsonl",),
            test_files=("tuner:sums/test.jsonl",),
            template="internlm2",
            max_length=48,
            limit=8,
        ),
        prompts_per_step=4,
        sampling=Sampling(max_new_tokens=6),
        tokens_per_pass=512,
        max_steps=2,
        precision="fp32",
        evaluation=PolicyEvaluation(samples=0),
    )
    run = tuner.train(config, runs=tmp_path)
    assert [record["step"] for record in run.metrics] == [1, 2]
    assert all(0 < record["score"] < 1 and record["grad_norm"] > 0 for record in run.metrics)
    assert (run.folder / "curves.png").is_file()
    assert Run(run.folder).config == config
    assert json.loads((run.folder / "results.json").read_text())["score"]["after"] > 0
