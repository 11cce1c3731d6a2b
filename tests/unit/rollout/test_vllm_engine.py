"""The engine on a server that loses requests, adapters and itself: every prompt has one answer, of these weights."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.conftest import ROOT
from tests.unit.rollout.vllm_stand_in import StandIn, completion, cut_short, failure
from tuner.config import VLLM, LoRA, Model, Sampling
from tuner.errors import UserError
from tuner.models.load import load_model
from tuner.models.roles import Roles
from tuner.rollout import vllm_serving
from tuner.rollout.stored_answers import StoredAnswers
from tuner.rollout.vllm_client import KEY, VLLMClient
from tuner.rollout.vllm_engine import VLLMEngine
from tuner.rollout.vllm_server import usable_port
from tuner.rollout.vllm_serving import Serving
from tuner.training.devices import Devices

PROMPTS = [np.array([1, 40 + number], np.int32) for number in range(10)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def devices() -> Devices:
    return Devices(device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def roles(devices: Devices) -> Roles:
    loaded = load_model(
        Model(path="tuner:tiny"), precision="fp32", device=CPU, adapter=LoRA(r=2, targets=("q_proj",))
    )
    return Roles.of("policy", loaded, devices.autocast)


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture
def url(stand_in, monkeypatch, tmp_path) -> Iterator[str]:
    monkeypatch.setattr(vllm_serving, "BACKOFF", 0.01)
    monkeypatch.setattr(vllm_serving, "POLL", 0.01)
    monkeypatch.delenv(KEY, raising=False)
    with stand_in.serving() as address:
        yield address


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def engine(url, roles, devices, said, tmp_path):
    """An engine in a folder of this test; a second one is that of a resumed run."""

    def made(sampling: Sampling | None = None, **settings: Any) -> VLLMEngine:
        config = VLLM(url=url, concurrency=4, timeout=5.0, **{"patience": 0.2, "retries": 2} | settings)
        serving = Serving(
            config, roles.loaded, tmp_path / "policy", server=None, base=lambda: Path(), say=said.append
        )
        return VLLMEngine(
            serving=serving,
            stored=StoredAnswers(tmp_path / "answers"),
            roles=roles,
            end_ids={2},
            sampling=sampling or Sampling(max_new_tokens=6, top_k=9),
            seed=5,
            devices=devices,
            oldest_step=lambda: 0,
            discard=lambda: None,
        )

    return made


def same(answers, others) -> bool:
    return all(
        np.array_equal(one.tokens, two.tokens)
        and np.array_equal(one.logprobs, two.logprobs)
        and (one.ended, one.cut) == (two.ended, two.cut)
        for one, two in zip(answers, others, strict=True)
    )


def test_a_request_says_all_of_sampling_and_a_seed_of_its_own(engine, stand_in):
    engine().generate(PROMPTS, step=3)
    assert len({body["seed"] for body in stand_in.completions}) == len(PROMPTS)
    bodies = sorted(stand_in.completions, key=lambda body: body["prompt"])
    assert [body["prompt"] for body in bodies] == [prompt.tolist() for prompt in PROMPTS]
    expected = {
        "max_tokens": 6,
        "min_tokens": 0,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 9,
        "repetition_penalty": 1.0,
        "stop_token_ids": [2],
        "ignore_eos": True,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }
    for body in bodies:
        assert expected.items() <= body.items()
        assert body["model"] in stand_in.adapters


def test_seeds_depend_on_seed_step_and_index_alone(engine, stand_in):
    first, second = engine(), engine()
    first.generate(PROMPTS, step=1)
    seeds = {tuple(body["prompt"]): body["seed"] for body in stand_in.completions}
    stand_in.completions.clear()
    second.generate(PROMPTS[:4], step=1)
    assert {tuple(body["prompt"]): body["seed"] for body in stand_in.completions}.items() <= seeds.items()
    stand_in.completions.clear()
    second.generate(PROMPTS, step=2)
    assert not {body["seed"] for body in stand_in.completions} & set(seeds.values())


def test_answers_end_as_the_local_engines_do(engine, stand_in):
    """At the first end token, whatever the server says behind it; and at a stop text, which is cut off the text."""
    tokens = engine().roles.tokenizer("4 + 4 = 8. Well")["input_ids"]
    stop = Sampling(max_new_tokens=60, stop=("= 8",))
    for sampling, said, expected in (
        (Sampling(max_new_tokens=6), [7, 8, 2, 9], ([7, 8, 2], True, 0)),
        (Sampling(max_new_tokens=4), [7, 8, 9, 9], ([7, 8, 9, 9], False, 0)),
    ):
        stand_in.replies = iter([reply(completion(said, reason="stop"))])
        (answer,) = engine(sampling).generate(PROMPTS[:1], step=len(said) + sampling.max_new_tokens)
        assert (answer.tokens.tolist(), answer.ended, answer.cut) == expected
    stand_in.replies = iter([reply(completion(tokens, reason="stop"))])
    (answer,) = engine(stop).generate(PROMPTS[:1], step=99)
    assert answer.ended
    assert answer.text(engine().roles.tokenizer).rstrip().endswith("4 + 4")
    assert len(answer.tokens) < len(tokens)


def test_a_server_with_too_little_room_is_named(engine, stand_in):
    stand_in.replies = iter([reply(completion([7, 8], reason="length"))])
    with pytest.raises(UserError, match=r"ends answers at 2 tokens, .*--max-length"):
        engine().generate(PROMPTS[:1], step=0)


def test_a_rollout_is_answered_once_and_read_again(engine, stand_in):
    """Though the stand-in never answers a request twice alike, and the resumed run has no server at all."""
    answers = engine().generate(PROMPTS, step=0)
    held_out = engine().generate(PROMPTS, step=0, temperature=0.0)
    assert not same(answers, held_out)
    asked = len(stand_in.completions)
    resumed = engine()
    assert same(resumed.generate(PROMPTS, step=0), answers)
    assert same(resumed.generate(PROMPTS, step=0, temperature=0.0), held_out)
    assert len(stand_in.completions) == asked
    other = resumed.generate(PROMPTS[1:], step=0)
    assert len(stand_in.completions) == asked + 9, "other prompts, other answers"
    assert not same(other, answers[1:])


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another's"])
def test_a_damaged_file_is_no_rollout(engine, stand_in, tmp_path, damage):
    engine().generate(PROMPTS, step=0)
    (file,) = (tmp_path / "answers").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= damage == "flipped"
    file.write_bytes({"cut": content[:-9], "empty": b""}.get(damage, content))
    if damage == "another's":
        save_file({"tokens": np.zeros(3)}, file)
    engine().generate(PROMPTS, step=0)
    assert len(stand_in.completions) == 20
    engine().generate(PROMPTS, step=0)
    assert len(stand_in.completions) == 20, "now it is whole"


def test_rollouts_that_no_checkpoint_leads_to_are_removed(engine, tmp_path):
    for step in range(4):
        current = engine()
        current.oldest_step = lambda step=step: step - 1
        current.generate(PROMPTS[:1], step=step)
    assert sorted(file.name for file in (tmp_path / "answers").iterdir()) == [
        "step_000002.safetensors",
        "step_000003.safetensors",
    ]


def test_changed_weights_get_a_new_name_and_the_old_ones_go(engine, stand_in, roles, tmp_path):
    policy = engine()
    policy.generate(PROMPTS[:1], step=0)
    (first,) = stand_in.adapters
    assert Path(stand_in.adapters[first], "adapter_model.safetensors").is_file()
    with torch.no_grad():
        next(iter(roles.trained("policy").values())).add_(1.0)
    policy.generate(PROMPTS[:1], step=1)
    assert list(stand_in.adapters) == [first], "nobody has said so"
    policy.weights_changed()
    policy.generate(PROMPTS[:1], step=2)
    (second,) = stand_in.adapters
    assert second != first
    assert stand_in.completions[-1]["model"] == second
    assert [folder.name for folder in (tmp_path / "policy").iterdir()] == [second]
    policy.close()
    assert not stand_in.adapters
    assert not (tmp_path / "policy").exists()


def test_what_a_failure_lost_is_requested_again_and_nothing_else(engine, stand_in, said):
    lost = [lambda body: None] * 4 + [lambda body: cut_short(), lambda body: failure(500, "engine died")]
    stand_in.replies = iter(lost)
    answers = engine().generate(PROMPTS, step=0)
    assert len(answers) == 10
    assert len({body["seed"] for body in stand_in.completions}) == len(stand_in.completions) == 10
    assert any("requested again" in sentence for sentence in said)


def test_a_server_that_lost_the_adapter_gets_it_again(engine, stand_in):
    policy = engine()
    policy.generate(PROMPTS[:1], step=0)
    names = list(stand_in.adapters)
    stand_in.adapters.clear()
    policy.generate(PROMPTS, step=1)
    assert list(stand_in.adapters) == names


def test_too_many_failures_in_a_row_end_the_run_in_words(engine, stand_in, said):
    stand_in.replies = iter([lambda body: failure(500, "engine died")] * 100)
    with pytest.raises(
        UserError, match=r"3 failures in a row \(status 500: engine died\).*goes on from its last"
    ):
        engine().generate(PROMPTS, step=0)
    assert len(said) == 2


class ByHand:
    """A server process that somebody else starts, at one address."""

    def __init__(self) -> None:
        self.port, self.processes = usable_port(), list[subprocess.Popen[bytes]]()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.unit.rollout.vllm_stand_in", "--port", str(self.port)]
        self.processes.append(subprocess.Popen([*command, *arguments], cwd=ROOT))


@pytest.fixture
def by_hand(monkeypatch) -> Iterator[ByHand]:
    """The process dies after it has given four answers."""
    monkeypatch.setattr(vllm_serving, "BACKOFF", 0.01)
    monkeypatch.delenv(KEY, raising=False)
    server = ByHand()
    server.start("--answers", "4")
    client = VLLMClient(server.url, timeout=5.0)
    while not client.is_ready():
        time.sleep(0.05)
    yield server
    for process in server.processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_server_that_died_is_waited_for(by_hand, roles, said, tmp_path, comes_back):
    """In mid-generation: another one at its address is given the adapter, and what the first one owes."""

    def say(sentence: str) -> None:
        said.append(sentence)
        if comes_back and "waiting for the vLLM server" in sentence:
            by_hand.start()

    config = VLLM(url=by_hand.url, concurrency=1, retries=2, patience=60.0 if comes_back else 0.2)
    policy = tmp_path / "policy"
    serving = Serving(config, roles.loaded, policy, server=None, base=lambda: Path(), say=say)
    requests = [{"prompt": [1], "max_tokens": 3, "seed": seed} for seed in range(10)]
    if comes_back:
        assert len(serving.complete("0" * 64, requests)) == 10
        assert [process.poll() is None for process in by_hand.processes] == [False, True]
    else:
        with pytest.raises(UserError, match=r"no vLLM server has answered there for 0.2 s; start it with"):
            serving.complete("0" * 64, requests)
    assert ["6 answers are requested again" in said[0], "waiting" in said[1], len(said)] == [True, True, 2]


def reply(content: dict[str, Any]) -> Any:
    from starlette.responses import JSONResponse

    return lambda body: JSONResponse(content)
