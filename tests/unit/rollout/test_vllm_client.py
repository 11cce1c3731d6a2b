"""What a vLLM server may answer, and what its client makes of it: try again, load the adapter, or give up in words."""

from collections.abc import Iterator

import pytest
from starlette.responses import JSONResponse, Response

from tests.unit.rollout.vllm_stand_in import LOGPROB, Late, StandIn, completion, cut_short, failure
from tuner.errors import UserError
from tuner.rollout.vllm_client import (
    KEY,
    Completion,
    ServerAwayError,
    UnknownModelError,
    VLLMClient,
    keep_key,
)

REQUEST = {"model": "base", "prompt": [1, 5, 7], "max_tokens": 4, "seed": 3}


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture
def client(stand_in: StandIn) -> Iterator[VLLMClient]:
    with stand_in.serving() as url:
        yield VLLMClient(url, timeout=5.0, concurrency=4)


def asked(client: VLLMClient, count: int = 1) -> dict[int, Completion]:
    completions: dict[int, Completion] = {}
    client.complete([{**REQUEST, "seed": seed} for seed in range(count)], completions.__setitem__)
    return completions


def test_tokens_and_logprobs_come_back(client, stand_in):
    completions = asked(client, 9)
    assert sorted(completions) == list(range(9))
    assert {body["seed"] for body in stand_in.completions} == set(range(9))
    assert all(body["prompt"] == [1, 5, 7] for body in stand_in.completions)
    for answer in completions.values():
        assert 1 <= len(answer.tokens) <= 4
        assert answer.logprobs.tolist() == [LOGPROB] * len(answer.tokens)
        assert answer.reason == ("stop" if answer.tokens[-1] == 2 else "length")


def test_adapters_are_loaded_and_unloaded(client):
    client.load_adapter("one", "/folder")
    assert client.models() == ["base", "one"]
    client.unload_adapter("one")
    client.unload_adapter("one")
    assert client.models() == ["base"]
    with pytest.raises(UnknownModelError):
        client.complete([{**REQUEST, "model": "one"}], lambda index, answer: None)


@pytest.mark.parametrize(
    "reply",
    [
        failure(500, "engine died"),
        failure(503, "starting"),
        failure(429, "too many"),
        cut_short(),
        JSONResponse(completion([5, 6], reason="abort")),
    ],
    ids=["500", "503", "429", "cut short", "aborted"],
)
def test_what_may_pass_is_told_from_what_will_not(client, stand_in, reply):
    stand_in.replies = iter([lambda body: reply])
    with pytest.raises(ServerAwayError):
        asked(client)
    assert len(asked(client)) == 1, "the server is as before"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Response(b"<html>", 200), "no JSON"),
        (JSONResponse([1]), "no JSON object"),
        (JSONResponse({"choices": []}), "lacks token_ids or logprobs"),
        (JSONResponse({"choices": [{"text": "4"}]}), "lacks token_ids or logprobs"),
        (JSONResponse(completion([5, 6, 7, 8, 9])), "5 tokens, where 4 were asked for"),
        (JSONResponse(completion([5, -6])), "2 tokens"),
        (JSONResponse(completion([5, 6], logprob=0.5)), "log-probabilities that are none"),
        (failure(400, "max_tokens is too large\x1b[31m"), r"\(400: max_tokens is too large\\x1b"),
        (failure(401, "no"), KEY),
    ],
    ids=["no JSON", "list", "empty", "text alone", "too long", "negative", "positive", "refused", "key"],
)
def test_an_answer_that_is_none_ends_the_run_in_words(client, stand_in, reply, words):
    stand_in.replies = iter([lambda body: reply])
    with pytest.raises(UserError, match=words):
        asked(client)


def test_a_slow_answer_is_not_waited_for(stand_in):
    with stand_in.serving() as url:
        stand_in.replies = iter([lambda body: Late(1.0)])
        with pytest.raises(ServerAwayError, match="no answer in time"):
            asked(VLLMClient(url, timeout=0.2))


def test_what_was_answered_before_a_failure_is_kept(client, stand_in):
    stand_in.replies = iter([lambda body: None] * 6 + [lambda body: failure(500, "engine died")] * 20)
    completions: dict[int, Completion] = {}
    with pytest.raises(ServerAwayError):
        client.complete([{**REQUEST, "seed": seed} for seed in range(20)], completions.__setitem__)
    assert len(completions) == 6


def test_a_server_that_is_away_is_not_ready(stand_in):
    with stand_in.serving() as url:
        assert VLLMClient(url, timeout=5.0).is_ready()
    assert not VLLMClient(url, timeout=5.0).is_ready()


def test_the_key_is_sent_and_kept_for_this_user_alone(monkeypatch, tmp_path):
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path))
    server = StandIn(key="secret")
    with server.serving() as url:
        client = VLLMClient(url, timeout=5.0)
        with pytest.raises(UserError, match=KEY):
            client.is_ready()
        assert VLLMClient(url, timeout=5.0, key="secret").is_ready()
        with keep_key(url, "secret"):
            (file,) = tmp_path.iterdir()
            assert file.stat().st_mode & 0o777 == 0o600
            assert client.is_ready()
        server.key = "another"  # started anew
        with keep_key(url, "another"):
            assert client.is_ready()
        assert not list(tmp_path.iterdir())
        server.key = "secret"
        monkeypatch.setenv(KEY, "secret")
        assert VLLMClient(url, timeout=5.0).is_ready()
