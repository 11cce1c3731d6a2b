"""Small random models in folders, one for each family, written once."""

from pathlib import Path

import pytest
import torch

import tuner.models  # noqa: F401 (registers InternLM2)
from tuner.models.tiny import tiny_model_folder


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def internlm2_folder(tmp_path_factory) -> Path:
    return tiny_model_folder("internlm/internlm2-7b", tmp_path_factory.mktemp("models") / "internlm2")


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory) -> Path:
    """A Llama whose head is its embedding."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder("meta-llama/Llama-3.2-1B", tmp_path_factory.mktemp("models") / "tied")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    tied = type(model)(model.config)
    tied.save_pretrained(folder)
    return folder


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(16, 1024, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held in bf16 is tested on any CPU, also where products in it are slow, and so left out by default."""
    if "no_bf16" not in request.fixturenames:
        monkeypatch.setattr("tuner.models.arithmetic.computes_in_bf16", lambda device: True)
