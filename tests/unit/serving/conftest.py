"""A tiny model that was taught a few tool rows by heart, behind our server on a port of this machine."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from openai import OpenAI

from tuner.config import Model
from tuner.data.batch import make_batch
from tuner.data.conversation import Conversation
from tuner.data.conversation_rows import conversation_reader
from tuner.data.examples import tokenize
from tuner.data.template import Template
from tuner.models.chat import ChatModel, answer_ends
from tuner.models.forward import token_loss
from tuner.models.load import load_model
from tuner.models.save import save_model
from tuner.serving.app import ChatApp
from tuner.serving.batcher import Batcher
from tuner.serving.served_model import ServedModel

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
QUESTION = {"role": "user", "content": "What is the weather in Shanghai?"}
CALL = {
    "role": "assistant",
    "content": "I will look.",
    "tool_calls": [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Shanghai"}}}
    ],
}
CODE = "print(2 ** 10)"
INTERPRETER = {"role": "system", "name": "<|interpreter|>", "content": "You can run Python."}
COMPUTE = {"role": "user", "content": "Compute 2 to the 10th."}
ROWS = (
    {
        "messages": [
            QUESTION,
            CALL,
            {"role": "tool", "content": '{"celsius": 22}'},
            {"role": "assistant", "content": "It is 22 degrees."},
        ],
        "tools": TOOLS,
    },
    {
        "messages": [
            INTERPRETER,
            COMPUTE,
            {
                "role": "assistant",
                "content": f"<|action_start|><|interpreter|>\n```python\n{CODE}\n```<|action_end|>",
            },
            {"role": "environment", "name": "<|interpreter|>", "content": "1024"},
            {"role": "assistant", "content": "It is 1024."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "A model, 二 years old."},
        ]
    },
)
NAME = "taught"
MAX_LENGTH = 600


@pytest.fixture(scope="session")
def taught_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained on ROWS until it knows them by heart."""
    torch.manual_seed(0)
    loaded = load_model(Model(path="tuner:tiny"), precision="fp32", device=torch.device("cpu"))
    template = Template("internlm2", loaded.tokenizer)  # type: ignore[arg-type]
    loaded.tokenizer.chat_template = template.published
    reader = conversation_reader()
    rendered = []
    for place, row in enumerate(ROWS):
        conversation = reader.read(row, f"row {place}")
        assert isinstance(conversation, Conversation)
        rendered.append(template.render_row(conversation))
    batch = make_batch(tokenize(rendered, loaded.tokenizer))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=4e-3)
    for _ in range(60):
        loss = token_loss(loaded.model, batch) / len(batch.learned_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.03:
            break
    folder = tmp_path_factory.mktemp("models") / NAME
    save_model(loaded, folder)
    return folder


@pytest.fixture(scope="session")
def chat(taught_folder: Path) -> ChatModel:
    loaded = load_model(
        Model(path=str(taught_folder)), precision="fp32", device=torch.device("cpu"), train=False
    )
    template = Template("tokenizer", loaded.tokenizer)  # type: ignore[arg-type]
    return ChatModel(loaded, template, answer_ends(loaded))


@dataclass
class Served:
    """A server that answers."""

    url: str
    batcher: Batcher
    model: ServedModel

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def served(chat: ChatModel) -> Iterator[Served]:
    model = ServedModel(chat, NAME, max_length=MAX_LENGTH, max_new_tokens=90)
    batcher = Batcher(chat.loaded.model, max_rows=64, max_slots=65_536)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        server = uvicorn.Server(
            uvicorn.Config(ChatApp(model, batcher, None).app, log_level="warning", lifespan="off")
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", batcher, model)
        server.should_exit = True
        thread.join()
        batcher.close()
        batcher.join()


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
