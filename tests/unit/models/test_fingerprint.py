"""A fingerprint tells models apart and knows them again elsewhere."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuner.models import fingerprint as module
from tuner.models.fingerprint import fingerprint


@pytest.fixture
def copy(internlm2_folder, tmp_path):
    return shutil.copytree(internlm2_folder, tmp_path / "copy")


def test_it_does_not_depend_on_where_the_folder_lies(internlm2_folder, copy):
    assert fingerprint(copy) == fingerprint(internlm2_folder)


def test_it_is_of_the_files_that_the_model_is_loaded_from(copy):
    before = fingerprint(copy)
    save_file({"weight": torch.zeros(3)}, copy / "consolidated.safetensors")
    assert fingerprint(copy) == before
    (copy / "consolidated.safetensors").rename(copy / "model.safetensors")
    assert fingerprint(copy) != before


def test_it_changes_with_one_weight(copy):
    before = fingerprint(copy)
    file = copy / "model.safetensors"
    weights = load_file(file)
    weights["output.weight"][5, 7] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert fingerprint(copy) != before


def test_it_changes_with_the_shape_and_not_with_a_version(copy):
    before = fingerprint(copy)
    file = copy / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"transformers_version": "9.9"}))
    assert fingerprint(copy) == before
    file.write_text(json.dumps(values | {"rope_theta": 1.0}))
    assert fingerprint(copy) != before


def test_large_files_are_sampled_from_header_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_WHOLE", 4096)
    monkeypatch.setattr(module, "_CHUNK", 512)
    weight = torch.zeros(8192)
    file = tmp_path / "model.safetensors"

    def of(change):
        changed = weight.clone()
        change(changed)
        save_file({"weight": changed}, file)
        return fingerprint(tmp_path)

    plain = of(lambda weight: None)
    assert of(lambda weight: weight[-1].add_(1)) != plain
    assert of(lambda weight: weight.add_(1)) != plain
    save_file({"other": weight}, file)
    assert fingerprint(tmp_path) != plain
