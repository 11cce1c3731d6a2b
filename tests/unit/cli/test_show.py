"""`tuner show`: value, origin and meaning of every leaf."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tuner.cli.show import show
from tuner.config import SFT, AdamW, Chat, Constant, LoRA, Model, Source, from_json, leaves, override
from tuner.config.base import ConfigBase
from tuner.config.config_table import python_source, table, to_html
from tuner.errors import UserError

app = typer.Typer()
app.command()(show)
CONFIG = SFT(name="r", model=Model(path="tuner:tiny"), adapter=LoRA(r=8), data=Chat(files=("rows.jsonl",)))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(
        '"""Mine."""\nfrom tuner.config import SFT, Chat, LoRA, Model\n'
        'config = SFT(model=Model(path="tuner:tiny"), adapter=LoRA(r=8), data=Chat(files=("rows.jsonl",)))\n'
    )
    return str(path)


def _origins(config: ConfigBase, *overridden: str) -> dict[str, str]:
    return {row.path: row.origin for row in table(config, overridden)}


def test_every_leaf_is_shown_once_with_its_meaning() -> None:
    rows = table(CONFIG)
    assert [row.path for row in rows] == [leaf.path for leaf in leaves(CONFIG)]
    assert all(row.meaning for row in rows)


def test_origins() -> None:
    changed = override(CONFIG, {"optimizer.lr": 1e-3, "data.files.0": "other.jsonl"})
    origins = _origins(changed, "optimizer.lr", "data.files.0")
    assert origins["optimizer.lr"] == "override"
    assert origins["data.files"] == "override"
    assert origins["adapter.r"] == "config"
    assert origins["model.path"] == "config"
    assert origins["adapter.alpha"] == "default", "16 and 16.0 are the same"
    assert origins["seed"] == "default"


def test_overriding_a_nested_config_overrides_all_its_leaves() -> None:
    changed = override(CONFIG, {"tracking": {"project": "p"}})
    origins = _origins(changed, "tracking")
    assert {origin for path, origin in origins.items() if path.startswith("tracking.")} == {"override"}


def test_a_nested_config_of_another_kind_comes_from_the_config() -> None:
    changed = CONFIG.model_copy(update={"schedule": Constant()})
    assert _origins(changed)["schedule.kind"] == "config"
    assert _origins(changed)["schedule.warmup"] == "default"


def test_a_stages_default_for_a_nested_config_is_a_default() -> None:
    class Stage(ConfigBase):
        optimizer: AdamW = AdamW(lr=1e-6)
        """Optimizer settings."""

    assert _origins(Stage())["optimizer.lr"] == "default"
    assert _origins(Stage(optimizer=AdamW()))["optimizer.lr"] == "config"


def test_values_are_shown_as_python_source() -> None:
    assert python_source((Source(path="a.jsonl", share=2.0), "b.jsonl")) == (
        "(Source(path='a.jsonl', share=2.0), 'b.jsonl')"
    )
    assert python_source(("a",)) == "('a',)"
    assert python_source({"helpful": ("a", 1)}) == "{'helpful': ('a', 1)}"
    assert python_source(None) == "None"


def test_html_is_escaped() -> None:
    html = to_html(CONFIG.model_copy(update={"data": Chat(files=("<script>.jsonl",))}))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert html.count("<tr") == len(table(CONFIG)) + 1
    assert "\u202e" not in to_html(CONFIG.model_copy(update={"name": "\u202e"}))


def test_lines_without_a_terminal_are_not_wrapped(file: str) -> None:
    result = CliRunner().invoke(app, [file, "optimizer.lr=1e-3"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) == len(table(CONFIG))
    (line,) = [line for line in lines if line.startswith("optimizer.lr ")]
    assert line.split()[:4] == ["optimizer.lr", "0.001", "override", "Peak"]


def test_json_holds_the_whole_config_and_its_leaves(file: str) -> None:
    result = CliRunner().invoke(app, [file, "adapter.r=4", "--json"])
    document = json.loads(result.output)
    config = from_json(json.dumps(document["config"]))
    assert isinstance(config, SFT)
    assert config.adapter == LoRA(r=4)
    (leaf,) = [leaf for leaf in document["leaves"] if leaf["path"] == "adapter.r"]
    assert leaf == {
        "path": "adapter.r",
        "value": 4,
        "origin": "override",
        "meaning": "Rank of the adapter matrices.",
    }


def test_an_unknown_field_is_a_user_error(file: str) -> None:
    result = CliRunner().invoke(app, [file, "optimizer.learning_rate=1"])
    assert isinstance(result.exception, UserError)
