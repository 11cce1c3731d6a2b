"""A real vLLM server answers as the local engine does: tokens, ends, log-probabilities; after updates and kills."""

from __future__ import annotations

import os
import re
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.vllm.conftest import until
from tuner.config import VLLM, LoRA, Model, Sampling
from tuner.models.answer_end import StopTexts
from tuner.models.forward import token_logprobs
from tuner.models.generate import Answer, generate
from tuner.models.load import Loaded, load_model
from tuner.models.roles import Roles
from tuner.rollout.rollout import Rollout
from tuner.rollout.stored_answers import StoredAnswers
from tuner.rollout.vllm_base import ServedBase
from tuner.rollout.vllm_engine import VLLMEngine
from tuner.rollout.vllm_server import VLLMServer, find_python, usable_port
from tuner.rollout.vllm_serving import Serving
from tuner.training.devices import Devices

TEXTS = (
    *("In the beginning God created", "What is 3 + 4?", "And the king said unto him,", "A dog is an animal"),
    *("The LORD spake unto Moses", "Blessed are they that", "a small piece of wood used", "12 + 9 ="),
)
ENDS = (2, 14)
"""The end token, and the comma, so that many answers end."""
CPU = torch.device("cpu")
FP32_GAP = 1e-4
"""Nats: both compute in fp32, in other orders of summation; the model's own rounding is a few 1e-6."""


def perturbed(loaded: Loaded, seed: int) -> None:
    """Adapter weights far from those of a fresh one, which changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * (0.1 if "lora_B" in name else 0.05))


def greedy(loaded: Loaded, prompts: list[np.ndarray], sampling: Sampling, ends=ENDS) -> list[Answer]:
    return generate(
        loaded.model,
        [prompt.tolist() for prompt in prompts],
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens,
        end_ids=ends,
        stop=StopTexts(loaded.tokenizer, sampling.stop) if sampling.stop else None,
    )


def assert_alike(answers: list[Answer], expected: list[Answer]) -> None:
    for answer, other in zip(answers, expected, strict=True):
        assert answer.tokens.tolist() == other.tokens.tolist()
        assert (answer.ended, answer.cut) == (other.ended, other.cut)
        assert np.abs(answer.logprobs - other.logprobs).max() < FP32_GAP


def running_requests(server: VLLMServer) -> float:
    """The server's own count of the requests that it is generating for."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        metrics = response.read().decode()
    return sum(map(float, re.findall(r"^vllm:num_requests_running{.*} (.*)$", metrics, re.MULTILINE)))


@pytest.fixture(scope="module")
def devices() -> Devices:
    return Devices(device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model(
        Model(path="tuner:tiny"), precision="fp32", device=CPU, adapter=LoRA(r=8, alpha=16.0), seed=1
    )


@pytest.fixture(scope="module")
def prompts(loaded: Loaded) -> list[np.ndarray]:
    return [np.array(loaded.tokenizer(text)["input_ids"], np.int32) for text in TEXTS]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[VLLMServer]:
    """A server of the embedded base, in Llama's layout, that loads adapters; started by the first engine."""
    folder = tmp_path_factory.mktemp("server")
    base = ServedBase.of("tuner:tiny", "fp32", None, 8, False)
    settings = base.settings(find_python(None), usable_port(), 1.0, 256, ())
    server = VLLMServer(settings, folder / "vllm.log")
    yield server
    server.close()


@pytest.fixture
def engine(server, loaded, devices, tmp_path) -> Callable[..., VLLMEngine]:
    def made(sampling: Sampling, ends=ENDS) -> VLLMEngine:
        folder = server.log.parent
        base = ServedBase.of("tuner:tiny", "fp32", None, 8, False)
        serving = Serving(
            VLLM(timeout=120.0, patience=300.0),
            loaded,
            tmp_path / "policy",
            server=server,
            base=lambda: base.written(folder),
            say=print,
        )
        roles = Roles.of("policy", loaded, devices.autocast)
        stored = StoredAnswers(tmp_path / "answers")
        return VLLMEngine(
            serving, stored, roles, ends, sampling, 7, devices, oldest_step=lambda: 0, discard=lambda: None
        )

    return made


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=24),
        Sampling(max_new_tokens=24, min_new_tokens=9),
        Sampling(max_new_tokens=24, stop=(" of", "thou")),
        Sampling(max_new_tokens=24, stop=(" of",), min_new_tokens=5),
    ],
    ids=["plain", "minimum", "stop texts", "both"],
)
def test_greedy_answers_are_the_local_engines(engine, loaded, prompts, sampling):
    perturbed(loaded, seed=0)
    expected = greedy(loaded, prompts, sampling)
    assert len({answer.ended for answer in expected}) == 2, "some end, some are truncated"
    assert_alike(engine(sampling).generate(prompts, step=0, temperature=0.0), expected)


def test_a_changed_adapter_is_what_answers(engine, server, loaded, prompts):
    sampling, seen = Sampling(max_new_tokens=12), []
    policy = engine(sampling)
    policy.generate(prompts[:1], step=0, temperature=0.0)
    others = set(policy.serving._client.models())
    for seed in (1, 2):
        perturbed(loaded, seed)
        policy.weights_changed()
        answers = policy.generate(prompts, step=0, temperature=0.0)
        assert_alike(answers, greedy(loaded, prompts, sampling))
        seen.append([answer.tokens.tolist() for answer in answers])
    assert seen[0] != seen[1]
    names = set(policy.serving._client.models())
    assert len(names) == len(others), "each adapter was unloaded for the next"
    assert len(names - others) == 1


def test_logprobs_of_sampled_tokens_are_the_trainers(engine, loaded, devices, prompts):
    """Over the full vocabulary, although top_p and top_k leave tokens out of sampling."""
    perturbed(loaded, seed=3)
    sampling = Sampling(max_new_tokens=16, top_p=0.9, top_k=50)
    answers = engine(sampling).generate(prompts * 3, step=4)
    assert len({tuple(answer.tokens.tolist()) for answer in answers}) > 12
    rollout = Rollout([], prompts * 3, answers, [], 1)
    for row in rollout.rows(1, 4096, devices):
        trainers, _ = token_logprobs(loaded.model, row.batch, 1.0)
        sampled = np.concatenate([answers[index].logprobs for index in row.answers.tolist()])
        assert np.abs(trainers.detach().numpy() - sampled).max() < FP32_GAP


def test_a_server_killed_in_mid_generation_is_started_again(
    engine, server, loaded, prompts, tmp_path, capsys
):
    """Every prompt has its answer, and greedy ones are those of a server that was never killed."""
    perturbed(loaded, seed=4)
    sampling = Sampling(max_new_tokens=200)
    policy = engine(sampling, ends=(2,))
    policy.generate(prompts[:1], step=0, temperature=0.0)
    first, answers = server.pid, []
    many = prompts * 12

    def answer() -> None:
        answers.extend(policy.generate(many, step=0, temperature=0.0))

    thread = threading.Thread(target=answer)
    thread.start()
    until(lambda: running_requests(server) > 0)
    assert thread.is_alive()
    os.killpg(first, signal.SIGKILL)
    thread.join()
    assert server.pid != first
    assert "the vLLM server died" in capsys.readouterr().out
    assert_alike(answers, greedy(loaded, many, sampling, ends=(2,)))
    policy.close()
    assert not server.is_running
    assert server.key not in server.log.read_text()
    assert not (tmp_path / "policy").exists()


def test_a_base_of_four_bits_is_served_dequantized(tmp_path, devices, prompts):
    """Its folder computes what the 4-bit layers do: checked on the weights, and by the gap of a run in test_runs.py."""
    from tuner.models.quantization import dequantized_weight, quantized_layers

    model = Model(path="tuner:tiny", quantization="nf4")
    folder = ServedBase.of("tuner:tiny", "fp32", "nf4", 8, False).written(tmp_path)
    served = load_model(Model(path=str(folder)), precision="fp32", device=CPU, train=False)
    quantized = load_model(model, precision="fp32", device=CPU, train=False)
    for name, layer in quantized_layers(quantized.transformer):
        assert torch.equal(served.transformer.get_parameter(f"{name}.weight"), dequantized_weight(layer))
    sampling = Sampling(max_new_tokens=12)
    assert_alike(greedy(served, prompts, sampling), greedy(quantized, prompts, sampling))
