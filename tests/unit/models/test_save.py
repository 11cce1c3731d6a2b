"""Saved folders are complete, and what cannot be saved is said in a sentence."""

import errno
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tuner.config import LoRA, Model
from tuner.errors import UserError
from tuner.models import save as module
from tuner.models.load import load_model
from tuner.models.save import save_model

CPU = torch.device("cpu")


def load(folder, adapter=None, precision="bf16"):
    return load_model(Model(path=str(folder)), precision=precision, device=CPU, adapter=adapter)


@pytest.mark.parametrize(("requested", "dtype"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_full_weights_are_written_in_the_asked_precision(internlm2_folder, tmp_path, requested, dtype):
    loaded = load(internlm2_folder)
    save_model(loaded, tmp_path, precision=requested)
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}


def test_saving_twice_gives_the_same_bytes(internlm2_folder, tmp_path):
    loaded = load(internlm2_folder, LoRA(r=4))
    for name in ("first", "second"):
        save_model(loaded, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "README.md" not in files
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk(internlm2_folder, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(module, "save_full", full)
    with pytest.raises(UserError, match=r"No space left on device.*free space"):
        save_model(load(internlm2_folder), tmp_path)


def test_importing_models_costs_neither_peft_nor_bitsandbytes():
    code = "import sys, tuner.models.load, tuner.models.save, tuner.models.merge, tuner.models.generate\n"
    code += "print([name for name in ('peft', 'bitsandbytes') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
