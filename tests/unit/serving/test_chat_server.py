"""Our server by OpenAI's own client: answers, streams, log-probabilities, tools, errors, many clients at once."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
import torch
from openai import AsyncOpenAI
from starlette.testclient import TestClient

from tests.unit.serving.conftest import (
    CODE,
    COMPUTE,
    INTERPRETER,
    MAX_LENGTH,
    NAME,
    QUESTION,
    ROWS,
    TOOLS,
    Served,
)
from tuner.data.batch import make_batch
from tuner.data.conversation import Turn
from tuner.models.chat import ChatModel
from tuner.models.forward import token_logprobs
from tuner.models.generate import uniforms
from tuner.serving.app import ChatApp

HELLO = [{"role": "user", "content": "Who are you?"}]
WHO = "A model, 二 years old."
GREEDY = {"model": NAME, "temperature": 0}


def ask(served: Served, messages: list[dict[str, Any]], **options: Any) -> Any:
    return served.client.chat.completions.create(messages=messages, **{**GREEDY, **options})


def exact_logprobs(chat: ChatModel, ids: list[int]) -> np.ndarray:
    """Log-probabilities of all tokens but the first, by the forward pass of training."""
    sample = (np.array(ids, np.int32), np.r_[0.0, np.ones(len(ids) - 1)].astype(np.float32))
    with torch.no_grad():
        return token_logprobs(chat.loaded.model, make_batch([sample]))[0].numpy()


# Answers


def test_a_chat_is_answered_as_tuner_chat_answers_it(served, chat):
    assert [model.id for model in served.client.models.list()] == [NAME]
    answer = ask(served, HELLO, extra_body={"return_token_ids": True})
    (choice,) = answer.choices
    assert choice.message.content == "".join(chat.answer([Turn("user", "Who are you?")])) == WHO
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    ids = answer.model_extra["prompt_token_ids"]
    tokenizer = chat.loaded.tokenizer
    expected = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == expected
    assert ids.count(tokenizer.bos_token_id) == 1
    generated = choice.model_extra["token_ids"]
    assert generated[-1] in chat.end_ids
    assert generated[:-1] == tokenizer.encode(WHO, add_special_tokens=False)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(generated))


def test_samples_follow_their_seed_and_differ_in_one_request(served, chat):
    options = {"temperature": 4.0, "n": 3, "max_tokens": 12}
    story = [{"role": "user", "content": "Tell me of the king."}]
    first = [choice.message.content for choice in ask(served, story, seed=0, **options).choices]
    assert first == [choice.message.content for choice in ask(served, story, seed=0, **options).choices]
    assert len(set(first)) == 3
    turns = [Turn("user", "Tell me of the king.")]
    assert first[0] == "".join(chat.answer(turns, temperature=4.0, max_new_tokens=12))
    unseeded = [choice.message.content for choice in ask(served, story, **options).choices]
    assert unseeded != first


def test_a_stream_joined_is_the_answer(served):
    options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
    texts, finishes, usage = ["", ""], {}, None
    chunks = list(ask(served, HELLO, **options))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    assert texts == [WHO, WHO]
    assert finishes == {0: "stop", 1: "stop"}
    assert len(chunks) > 8
    whole = ask(served, HELLO, n=2).usage
    assert usage == whole


def test_stop_texts_and_lengths_end_answers(served):
    cut = ask(served, HELLO, stop=["years", "zz"]).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("A model, 二 ", "stop")
    streamed = ask(served, HELLO, stop="years", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "A model, 二 "
    short = ask(served, HELLO, max_tokens=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)
    assert WHO.startswith(short.choices[0].message.content)


def test_logprobs_are_those_of_training(served, chat):
    answer = ask(served, HELLO, logprobs=True, top_logprobs=2, extra_body={"return_token_ids": True})
    content = answer.choices[0].logprobs.content
    prompt, ids = answer.model_extra["prompt_token_ids"], answer.choices[0].model_extra["token_ids"]
    exact = exact_logprobs(chat, [*prompt, *ids])[len(prompt) - 1 :]
    np.testing.assert_allclose([token.logprob for token in content], exact, atol=2e-5)
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content), "greedy"
    assert all(len(token.top_logprobs) == 2 for token in content)


def test_a_completion_scores_its_prompt(served, chat):
    ids = chat.loaded.tokenizer.encode("the king said unto him,")
    options = {"model": NAME, "prompt": ids, "logprobs": 3, "echo": True, "temperature": 0}
    scored = served.client.completions.create(max_tokens=0, **options).choices[0]
    np.testing.assert_allclose(scored.logprobs.token_logprobs[1:], exact_logprobs(chat, ids), atol=2e-5)
    assert scored.logprobs.token_logprobs[0] is None
    assert len(scored.logprobs.tokens) == len(ids)
    assert all(len(likeliest) in (3, 4) for likeliest in scored.logprobs.top_logprobs[1:])
    going_on = served.client.completions.create(max_tokens=3, **options).choices[0]
    assert len(going_on.logprobs.tokens) == len(ids) + 3
    assert going_on.text.startswith(scored.text)
    text = served.client.completions.create(
        model=NAME, prompt=["the king", "<s>the king"], max_tokens=3, temperature=0
    )
    assert text.choices[0].text == text.choices[1].text, "one begin token, whoever writes it"
    assert text.usage.completion_tokens == 6
    streamed = served.client.completions.create(stream=True, max_tokens=3, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == going_on.text


# Tools


def test_a_call_is_answered_in_openais_shape_and_its_result_is_fed_back(served):
    answer = ask(served, [QUESTION], tools=TOOLS).choices[0]
    (call,) = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Shanghai"})
    assert (answer.message.content, answer.finish_reason) == ("I will look.", "tool_calls")
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"celsius": 22}'}
    messages = [QUESTION, answer.message.model_dump(exclude_none=True), result]
    final = ask(served, messages, tools=TOOLS, extra_body={"return_token_ids": True})
    assert final.choices[0].message.content == "It is 22 degrees."
    assert final.choices[0].message.tool_calls is None
    rendered = served.model.tokenizer.decode(final.model_extra["prompt_token_ids"])
    assert rendered.endswith(
        'I will look.<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "Shanghai"}}'
        '<|action_end|><|im_end|>\n<|im_start|>environment name=<|plugin|>\n{"celsius": 22}<|im_end|>\n'
        "<|im_start|>assistant\n"
    ), "as in training"


def test_calls_are_streamed(served):
    text, calls, finish = "", {}, None
    for chunk in ask(served, [QUESTION], tools=TOOLS, stream=True):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            calls[call.index] = (call.id, call.function.name, json.loads(call.function.arguments))
        finish = choice.finish_reason or finish
    assert (text, finish) == ("I will look.", "tool_calls")
    assert [call[1:] for call in calls.values()] == [("get_weather", {"city": "Shanghai"})]


def test_the_interpreter_is_a_tool_for_openai_and_text_for_lagent(served):
    messages = [INTERPRETER, COMPUTE]
    raw = ask(served, messages).choices[0]
    assert raw.message.content == ROWS[1]["messages"][2]["content"], "without tools, as Lagent reads it"
    result = {"role": "environment", "name": "<|interpreter|>", "content": "1024"}
    lagent = ask(served, [*messages, {"role": "assistant", "content": raw.message.content}, result])
    assert lagent.choices[0].message.content == "It is 1024."
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "abc", "type": "function", "function": {"name": "interpreter", "arguments": dumps(CODE)}}
        ],
    }
    fed_back = [*messages, called, {"role": "tool", "tool_call_id": "abc", "content": "1024"}]
    assert ask(served, fed_back).choices[0].message.content == "It is 1024."


def dumps(code: str) -> str:
    return json.dumps({"code": code})


def test_a_call_that_is_cut_off_is_text(served):
    answer = ask(served, [QUESTION], tools=TOOLS, max_tokens=14).choices[0]
    assert answer.finish_reason == "length"
    assert answer.message.tool_calls is None
    assert answer.message.content.startswith("I will look.<|action_start|><|plugin|>")
    streamed = ask(served, [QUESTION], tools=TOOLS, max_tokens=14, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == answer.message.content, "held back, but not lost"


def test_tool_choice(served):
    forced = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", forced):
        answer = ask(served, HELLO, tools=TOOLS, tool_choice=choice, extra_body={"return_token_ids": True})
        (only,) = answer.choices
        prompt = served.model.tokenizer.decode(answer.model_extra["prompt_token_ids"])
        assert prompt.endswith('<|plugin|>\n{"name": "' + ("get_weather" if choice is forced else ""))
        if only.message.tool_calls:
            assert only.message.tool_calls[0].function.name == "get_weather"
        else:
            assert only.message.content.startswith("<|action_start|>")
    without = ask(served, [QUESTION], tools=TOOLS, tool_choice="none", extra_body={"return_token_ids": True})
    assert "get_weather" not in served.model.tokenizer.decode(without.model_extra["prompt_token_ids"])


# Errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": []}, "messages is a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]: unknown role 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text parts"),
        ({"temperature": -1}, "temperature is a number from 0"),
        ({"temperature": True}, "temperature is a number"),
        ({"top_p": "high"}, "top_p is a number"),
        ({"n": 0}, "n is a whole number"),
        ({"n": 257}, "n is a whole number from 1 to 256"),
        ({"max_tokens": 0}, "max_tokens is a whole number"),
        ({"max_tokens": MAX_LENGTH}, f"at most {MAX_LENGTH} tokens"),
        ({"messages": [{"role": "user", "content": "king " * 700}]}, "shorten the messages"),
        ({"stop": ["a"] * 17}, "stop is a text"),
        ({"stop": [""]}, "stop is a text"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "from 0 to 20"),
        ({"frequency_penalty": 0.5}, "frequency_penalty=0.5 is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": "get_weather"}, '"tools" is text but not JSON'),
        ({"tool_choice": "required"}, "tool_choice is"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "other"}}}, "tool_choice is"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"seed": "x"}, "seed is a whole number"),
        ({"stream": "yes"}, "stream is true or false"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(served, changes, words):
    body = {**GREEDY, "messages": HELLO, **changes}
    response = served.client.with_options().chat.completions.with_raw_response
    with pytest.raises(openai.BadRequestError) as refusal:
        response.create(
            **{key: value for key, value in body.items() if key in ("model", "messages")}, extra_body=body
        )
    assert words in refusal.value.body["message"]
    assert refusal.value.body["type"] == "invalid_request_error"


def test_neutral_and_harmless_fields_are_taken(served):
    fields = {
        "max_tokens": 90,
        "max_completion_tokens": 90,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "user": "me",
        "response_format": {"type": "text"},
    }
    assert ask(served, HELLO, **fields, metadata={"a": "b"}).choices[0].message.content == WHO


def test_other_errors_have_their_status(served):
    with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
        ask(served, HELLO, model="other")
    with pytest.raises(openai.NotFoundError):
        served.client.embeddings.create(model=NAME, input="x")
    with pytest.raises(openai.BadRequestError, match="prompt is a text"):
        served.client.completions.create(model=NAME, prompt=[10**6])
    with pytest.raises(openai.BadRequestError, match="shorten the messages") as refusal:
        ask(served, [{"role": "user", "content": "king " * 700}], stream=True)
    assert refusal.value.code == "context_length_exceeded"
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc)
    connection.request("POST", "/v1/chat/completions", "{no JSON")
    response = connection.getresponse()
    assert (response.status, "is JSON" in json.loads(response.read())["error"]["message"]) == (400, True)


def test_a_failure_is_told_and_the_next_request_is_answered(served, chat, monkeypatch):
    from tuner.models import decoding

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "prefill", fail)
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            ask(served, HELLO)
        with pytest.raises(openai.APIError, match="out of memory"):
            list(ask(served, HELLO, stream=True))
    assert ask(served, HELLO).choices[0].message.content == WHO


# Clients


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "\ud800"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi", "name": "\ud800"}]}),
        ("/v1/chat/completions", {"messages": HELLO, "\ud800": 1}),
    ],
)
def test_half_of_a_character_is_refused_wherever_it_stands(served, path, body):
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", path, json.dumps({"model": NAME, "max_tokens": 2, **body}), headers)
    response = connection.getresponse()
    assert response.status == 400
    assert "has \\ud800, half of a character" in json.loads(response.read())["error"]["message"]


def test_32_clients_at_once_get_their_own_answers(served):
    random = np.random.default_rng(0)
    prompts = [random.integers(20, 1000, random.integers(1, 60)).tolist() for _ in range(32)]
    requests = [
        {
            "model": NAME,
            "prompt": prompt,
            "max_tokens": 6 + place // 3,
            "temperature": (0, 1)[place % 2],
            "seed": place,
            "extra_body": {"return_token_ids": True},
        }
        for place, prompt in enumerate(prompts)
    ]
    alone = [served.client.completions.create(**request).choices[0] for request in requests]
    before = served.batcher.largest

    async def all_at_once() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(client.completions.create(**request) for request in requests))

    together = [answer.choices[0] for answer in asyncio.run(all_at_once())]
    for one, other in zip(alone, together, strict=True):
        assert one.model_extra["token_ids"] == other.model_extra["token_ids"]
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
    assert served.batcher.largest > max(before, 8), "they were generated together"


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_its_client_leaves_is_given_up(served, stream):
    # no end token within the row: greedy answers of 500 tokens to token salad
    body = {"model": NAME, "prompt": [300] * 40, "max_tokens": 550, "temperature": 1, "seed": 1, "top_p": 1}
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc)
    connection.request("POST", "/v1/completions", json.dumps({**body, "n": 32, "stream": stream}))
    deadline = time.monotonic() + 30
    while served.batcher.running < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.batcher.running >= 8
    if stream:
        connection.getresponse().read(200)
    tokens = served.batcher.steps
    connection.sock.close()
    while served.batcher.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert served.batcher.running == 0
    assert served.batcher.steps - tokens < 300, "it was not generated to its end"


def test_only_who_may_ask_is_answered(served):
    app = ChatApp(served.model, served.batcher, "a-token").app

    def status(base: str = "http://127.0.0.1:8000", **headers: str) -> int:
        response = TestClient(app, base_url=base).get("/v1/models", headers=headers)
        assert response.status_code == 200 or response.json()["error"]["message"]
        return response.status_code

    good = {"Authorization": "Bearer a-token"}
    assert status(**good) == 200
    assert status("http://localhost:9999", **good) == 200
    assert status() == status(Authorization="Bearer other") == status(Authorization="a-token") == 401
    assert status("http://evil.example:8000", **good) == status(Host="[", **good) == 403
    assert status(Origin="http://evil.example", **good) == 403
    assert status(Origin="http://localhost:3000", **good) == 200


def test_the_noise_of_an_answer_is_addressed(served):
    (row,) = served.model.rows(served.model.read_completion(_fields(prompt="a", seed=7)), lambda piece: None)
    assert [row.noise() for _ in range(3)] == uniforms(7, 0, [0], 3)[0].tolist()


def _fields(**values: Any) -> Any:
    from tuner.serving.request_fields import RequestFields

    return RequestFields(values)
