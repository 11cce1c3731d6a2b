"""`tuner serve-rollouts`: what is refused before a server is started; tests/vllm has it serving."""

import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tuner.cli.serve_rollouts import serve_rollouts
from tuner.errors import UserError
from tuner.rollout.vllm_base import ServedBase
from tuner.rollout.vllm_server import PYTHON

app = typer.Typer()
app.command()(serve_rollouts)


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, UserError)
    return str(result.exception)


def test_a_missing_environment_is_refused_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PYTHON, raising=False)
    assert "no python of vLLM's environment" in refused("no-such-model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no-such-model/here",), "no-such-model/here"),
        (("tuner:tiny", "--quantization", "int3"), "--quantization int3: there are nf4 and int8"),
        (("tuner:tiny", "--precision", "fp8"), "--precision"),
        (("tuner:tiny", "--max-lora-rank", "600"), "rank 600 is more than vLLM loads"),
    ],
)
def test_what_cannot_be_served_is_refused(monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PYTHON, sys.executable)
    assert words in refused(*arguments, "--port", "0")
    assert not list(tmp_path.iterdir())


def test_the_base_is_written_once_under_a_name_of_its_own(tmp_path):
    plain = ServedBase.of("tuner:tiny", None, None, None, False)
    assert (plain.precision, plain.max_rank) == ("bf16", 64)
    folder = plain.written(tmp_path)
    before = Path(folder, "model.safetensors").stat().st_mtime_ns
    assert plain.written(tmp_path) == folder
    assert Path(folder, "model.safetensors").stat().st_mtime_ns == before
    quantized = ServedBase.of("tuner:tiny", "fp32", "nf4", 8, False).written(tmp_path)
    assert quantized != folder
    assert '"LlamaForCausalLM"' in Path(quantized, "config.json").read_text()
    again = ServedBase.of(str(folder), None, None, None, False)
    assert again.written(tmp_path / "elsewhere") == folder, "Llama's layout can be served as it is"
