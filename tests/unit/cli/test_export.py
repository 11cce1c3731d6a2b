"""`tuner export`: options that do not go together are refused before anything is loaded."""

from pathlib import Path

import pytest

from tests.small_models import write_case
from tuner.cli.main import app
from tuner.errors import UserError
from tuner.models.complete_folder import complete_folder
from tuner.models.tool_python import PYTHON


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onnx"], "--format onnx: no such format; write folder, gguf or gguf-lora"),
        (
            ["--format", "gguf", "--quantize", "awq"],
            "no such quantization of --format gguf; write f16, q8_0 or q4_k_m",
        ),
        (["--quantize", "q8_0"], "no such quantization of --format folder; write awq, gptq, int8 or fp8"),
        (["--format", "gguf-lora", "--quantize", "f16"], "--format gguf-lora; leave --quantize out"),
        (["--format", "gguf", "--layout", "llama"], "--layout llama: this file has a layout of its own"),
        (
            ["--quantize", "awq"],
            "--quantize awq needs llmcompressor: `pip install llmcompressor` here, or in an",
        ),
        (["--format", "gguf-lora"], "has no adapter; write --format gguf"),
    ],
)
def test_options_are_refused_in_a_sentence(tmp_path, monkeypatch, options, message):
    monkeypatch.setenv(PYTHON, str(tmp_path / "python"))
    with pytest.raises(UserError, match=message):
        app(["export", "tuner:tiny", str(tmp_path / "out"), *options], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path):
    write_case("internlm2", tmp_path / "base")
    with (
        pytest.raises(UserError, match="/proc/out: cannot be written"),
        complete_folder(
            str(tmp_path / "base"), Path("/proc/out"), dtype="fp32", texts=list, say=print, as_llama=True
        ),
    ):
        pass
