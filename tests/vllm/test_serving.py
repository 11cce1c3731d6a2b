"""`tuner serve` with a real vLLM: a run's adapter with its own template and calls, a reward model as a classifier."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.vllm.conftest import Command
from tests.vllm.test_engine import FP32_GAP, perturbed
from tuner.config import LoRA, Model
from tuner.data.batch import make_batch
from tuner.data.conversation import Conversation, Turn
from tuner.data.template import Template
from tuner.models.chat import open_chat
from tuner.models.forward import token_logprobs
from tuner.models.load import load_model
from tuner.models.save import save_model
from tuner.models.scorer import RewardInputs, ScoreRequest, open_scorer, prompt_of

# vLLM's server shows the template these fields in this order, absent ones as null
WEATHER = {"name": "weather", "description": "Weather of a place.", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": WEATHER}]
QUESTION = [{"role": "user", "content": "What is 23 + 14?"}]


def ask(url: str, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        url + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer secret"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.loads(response.read())


def test_an_adapter_is_served_as_it_computes_here(command: Callable[..., Command], tmp_path: Path) -> None:
    loaded = load_model(
        Model(path="tuner:tiny"), precision="fp32", device=torch.device("cpu"), adapter=LoRA(r=8, alpha=16.0)
    )
    perturbed(loaded, 0)
    # another than its base's, which vLLM would take by itself
    loaded.tokenizer.chat_template = Template("internlm2", loaded.tokenizer).published  # type: ignore[arg-type]
    save_model(loaded, tmp_path / "mine" / "model")
    chat = open_chat(str(tmp_path / "mine"), device=torch.device("cpu"))
    server = command(
        "serve", "mine", "--engine", "vllm", "--port", "0", "--token", "secret", "--max-length", "256"
    )
    url = server.wait_for(r"mine is served at (http://127\.0\.0\.1:\d+)/v1")[1]
    turns = (Turn("user", QUESTION[0]["content"]),)
    for tools in ((), TOOLS):
        prompt = chat.template.render_prompt(Conversation(turns, tuple(tools)))
        options = {"tools": TOOLS} if tools else {}
        answer = ask(
            url, "/v1/chat/completions", model="mine", messages=QUESTION, temperature=0, max_tokens=8,
            return_token_ids=True, **options,
        )  # fmt: skip
        assert answer["prompt_token_ids"] == prompt
        if not tools:
            content = answer["choices"][0]["message"]["content"]
            assert content == "".join(chat.answer(turns, max_new_tokens=8))
    scored = ask(
        url,
        "/v1/completions",
        model="mine",
        prompt=prompt,
        echo=True,
        logprobs=0,
        max_tokens=1,
        temperature=0,
    )
    theirs = scored["choices"][0]["logprobs"]["token_logprobs"][1 : len(prompt)]
    weights = np.r_[0.0, np.ones(len(prompt) - 1)].astype(np.float32)
    with torch.no_grad():
        ours, _ = token_logprobs(chat.loaded.model, make_batch([(np.array(prompt, np.int32), weights)]))
    assert np.abs(np.array(theirs) - ours.numpy()).max() < FP32_GAP
    assert server.end() == 0


def test_a_reward_model_is_served_as_a_classifier(command: Callable[..., Command], tmp_path: Path) -> None:
    options = ("max_steps=2", "evaluation.rows=2")
    assert command("train", "quickstart_reward", *options).process.wait() == 0
    export = command("export", "runs/quickstart_reward", "judge", "--layout", "llama", "--dtype", "fp32")
    assert export.process.wait() == 0
    server = command("serve", "judge", "--engine", "vllm", "--port", "0", "--token", "secret")
    url = server.wait_for(r"judge is served at (http://127\.0\.0\.1:\d+)/v1")[1]
    scorer = open_scorer(tmp_path / "runs" / "quickstart_reward")
    conversation = Conversation((Turn("user", "What is 2 + 3?"), Turn("assistant", "5.")))
    inputs = RewardInputs(scorer.loaded.tokenizer, scorer.record, scorer.template)
    (ids,) = inputs.make([ScoreRequest(conversation, None, prompt_of(conversation))])
    messages = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5."}]
    for body in ({"input": ids.tolist()}, {"messages": messages}):
        answer = ask(url, "/classify", model="judge", **body)
        assert abs(answer["data"][0]["probs"][0] - scorer.score_tokens([ids])[0]) < 1e-5
