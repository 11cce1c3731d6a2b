"""`tuner import`: files are written, nothing is overwritten, and the report is complete."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.unit.importers.conftest import CONFIGS
from tuner.cli.import_config import import_config
from tuner.config import SFT, load_config
from tuner.errors import UserError

app = typer.Typer()
app.command()(import_config)
XTUNER = "internlm2_7b_qlora_alpaca_e3.py"


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in CONFIGS.iterdir():
        shutil.copy(file, tmp_path)


def run(*arguments: str) -> str:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False).output


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ((XTUNER,), "internlm2_7b_qlora_alpaca_e3_tuner.py"),
        (("qwen3_lora_dpo.yaml",), "qwen3_lora_dpo.py"),
        (("llama3_qlora.yml", "--output", "mine.py"), "mine.py"),
        (("llama3_qlora.yml", "-o", "mine"), "mine.py"),
    ],
)
def test_the_config_is_written_where_it_is_said(arguments: tuple[str, ...], written: str) -> None:
    output = run(*arguments)
    assert f"written: {written}; next: tuner check {written} --tiny" in output
    assert load_config(written).name == Path(written).stem


def test_the_report_names_every_part() -> None:
    output = run(XTUNER)
    assert "XTuner 0.2, SFT;" in output
    for title in ("decided, with a comment in the file:", "could not be carried:", "need no counterpart:"):
        assert title in output
    assert "  custom_hooks.0.evaluation_inputs: " in output
    values = json.loads(run(XTUNER, "--json", "-o", "json.py"))
    assert values["lost"].keys() == {"custom_hooks.0.evaluation_inputs"}
    assert (values["tool"], values["stage"], values["written"]) == ("XTuner 0.2", "sft", ["json.py"])
    assert "model.lora.r" in values["carried"]


def test_nothing_is_overwritten() -> None:
    Path("mine.py").write_text("mine")
    with pytest.raises(UserError, match="not overwritten"):
        run("llama3_qlora.yml", "-o", "mine.py")
    assert Path("mine.py").read_text() == "mine"


def test_a_template_stands_beside_the_config_and_is_not_overwritten() -> None:
    text = Path(XTUNER).read_text(encoding="utf-8").replace("internlm2_chat", "default")
    Path(XTUNER).write_text(text, encoding="utf-8")
    Path("out").mkdir()
    assert "written: out/mine.py, out/mine.jinja" in run(XTUNER, "-o", "out/mine.py")
    config = load_config("out/mine.py")
    assert isinstance(config, SFT)
    assert config.data.kind == "chat"
    assert config.data.template == "out/mine.jinja"
    Path("out/mine.py").unlink()
    with pytest.raises(UserError, match=r"mine\.jinja exists already"):
        run(XTUNER, "-o", "out/mine.py")
    assert not Path("out/mine.py").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.yaml",), r"missing\.yaml: cannot be read"),
        (("README.md",), "ends in .py"),
        (("llama3_qlora.yml", "-o", "."), "is a folder"),
        (("llama3_qlora.yml", "-o", "no/such/mine.py"), "cannot be written"),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*arguments)


def test_the_batch_is_multiplied_by_the_devices() -> None:
    run(XTUNER, "--devices", "8")
    config = load_config("internlm2_7b_qlora_alpaca_e3_tuner.py")
    assert isinstance(config, SFT)
    assert config.tokens_per_step == 8 * 16 * 2048


@pytest.mark.parametrize("file", [XTUNER, "qwen3_lora_dpo.yaml"])
def test_no_heavy_library_is_imported(file: str) -> None:
    code = (
        "import sys\nfrom tuner.cli.main import main\n"
        f"sys.argv = ['tuner', 'import', {file!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'xtuner', 'mmengine'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bad_files_end_with_code_2(tuner_command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    Path("broken.py").write_text("model = dict(\n")
    done = tuner_command("import", "broken.py")
    assert done.returncode == 2
    assert done.stderr.startswith("tuner: broken.py:1: not valid Python")
    assert "Traceback" not in done.stderr


@pytest.fixture
def tuner_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "tuner", *arguments], capture_output=True, text=True)

    return command
