"""Memory of runs whose models are not at hand, from shapes; numbers of weights are those their makers state."""

import shutil
from pathlib import Path

import pytest
import torch

from tuner.config import Model, load_config, override
from tuner.errors import MissingError
from tuner.models.load import load_model
from tuner.models.shapes import known_shape, write_shape
from tuner.resources import locate
from tuner.stages.check import check

BILLIONS = {
    "internlm/internlm2-1_8b": 1.89,
    "internlm/internlm2-chat-7b-sft": 7.74,
    "internlm/internlm2-20b": 19.86,
    "internlm/internlm3-8b-instruct": 8.80,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8.03,
    "mistralai/Mistral-7B-v0.3": 7.25,
    "Qwen/Qwen3-8B-Base": 8.19,
    "HuggingFaceTB/SmolLM2-135M": 0.1345,
}
"""Weights as the model cards and the InternLM2 report (table 2) give them."""


@pytest.mark.parametrize("name", BILLIONS)
def test_shapes_have_the_published_number_of_weights(name: str, tmp_path: Path) -> None:
    shape = known_shape(name)
    assert shape is not None
    folder = write_shape(name, shape, tmp_path / "model")
    assert not list(folder.glob("*.safetensors"))
    loaded = load_model(Model(path=str(folder)), precision="bf16", device=torch.device("meta"))
    counted = sum(weight.numel() for weight in loaded.model.parameters())
    assert counted / 1e9 == pytest.approx(BILLIONS[name], abs=0.005)


def test_an_unknown_model_is_still_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = override(load_config("internlm2_7b_qlora"), {"model.path": "org/unknown"})
    with pytest.raises(MissingError, match="org/unknown: neither a folder here"):
        check(config, shapes=True)
    config = override(config, {"model.path": "runs/internlm2_7b_qloar"})
    with pytest.raises(MissingError, match="runs/internlm2_7b_qloar: no such model folder"):
        check(config, shapes=True)


def test_without_memory_a_missing_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match="internlm/internlm2-7b: neither a folder here"):
        check(load_config("internlm2_7b_qlora"))


def test_a_real_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of that name is at hand, and it is another model than the shipped config would train."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(locate("tuner:tiny"), tmp_path / "runs/internlm2_7b_full/model")
    config = override(load_config("internlm2_7b_qlora"), {"model.path": "runs/internlm2_7b_full"})
    report = check(config, shapes=True)  # its rows are on the hub
    assert report.unchecked.startswith("tatsu-lab/alpaca: ")
    assert report.shapes == {"runs/internlm2_7b_full": "the config.json in runs/internlm2_7b_full/model"}
    assert report.parameters < 1e7
    shutil.rmtree(tmp_path / "runs")
    report = check(config, shapes=True)
    assert report.parameters == pytest.approx(7.74e9, rel=0.001)
    assert report.shapes == {
        "internlm/internlm2-7b": "its shape as it ships with tuner",
        "runs/internlm2_7b_full": "the shape that the config internlm2_7b_full would give it",
    }


def test_roles_share_a_base_that_is_not_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward model's run is an adapter on the policy's base, so both are counted on one: 4 bits of 7B, once."""
    monkeypatch.chdir(tmp_path)
    report = check(load_config("internlm2_7b_ppo"), shapes=True)
    assert 12 < report.peak_gib < 30
