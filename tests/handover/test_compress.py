"""Models quantized by llm-compressor, fitted to a run's rows."""

import json

import pytest
import torch
from safetensors import safe_open

import tuner
from tuner.cli.main import app
from tuner.config import load_config, override
from tuner.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    changes = {
        "max_steps": 20,
        "name": "short",
        "data.limit": 300,
        "adapter": None,
        "model.quantization": None,
    }
    return tuner.train(override(load_config("quickstart_sft"), changes), runs=folder).folder


# AWQ of llm-compressor needs a GPU
KINDS = [*(["awq"] if torch.cuda.is_available() else []), "gptq", "int8", "fp8"]
STORED = {"awq": "I32", "gptq": "I32", "int8": "I8", "fp8": "F8_E4M3"}
"""Kind -> type of the stored weights: 4-bit ones are packed in words."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_awq_without_a_gpu_is_refused_in_a_sentence(run, tmp_path, tools_python):
    with pytest.raises(UserError, match="AWQ needs a GPU; write gptq"):
        app(["export", str(run), str(tmp_path / "out"), "--quantize", "awq"], standalone_mode=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_quantized_and_its_loss_measured(run, tmp_path, tools_python, capsys, kind):
    command = ["export", str(run), str(tmp_path / "out"), "--quantize", kind, "--dtype", "fp32"]
    app(command, standalone_mode=False)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss on"))
    before, after = (float(word) for word in line.replace(",", "").split() if "." in word)
    # the loss here, of the same rows, in another process and another transformers
    assert before == pytest.approx(json.loads((run / "results.json").read_text())["after"]["loss"], abs=2e-3)
    assert after < before + {"awq": 0.2, "gptq": 0.2, "int8": 0.02, "fp8": 0.05}[kind]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as weights:
        assert STORED[kind] in {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    print(line)
