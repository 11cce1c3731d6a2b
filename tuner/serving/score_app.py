"""The HTTP side for a reward model: /classify in vLLM's shape."""

from __future__ import annotations

import secrets
import time
from typing import Any, cast

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuner.data.conversation import Conversation
from tuner.data.encoding import encode_text
from tuner.data.turns import read_tools, read_turn
from tuner.models.scorer import RewardInputs, Scorer, ScoreRequest, prompt_of
from tuner.serving.app import models_response
from tuner.serving.guard import Guard, read_body
from tuner.serving.request_fields import RequestError, RequestFields

_MOST_INPUTS = 256


class ScoreApp:
    """The endpoints of a reward model. `app` is the ASGI application."""

    def __init__(self, scorer: Scorer, name: str, token: str | None) -> None:
        self._scorer, self._name = scorer, name
        guard = Guard(token)
        self.app = Starlette(
            routes=[
                Route("/health", guard.open(self._health)),
                Route("/v1/models", guard.open(self._models)),
                Route("/classify", guard.open(self._classify), methods=["POST"]),
                Route("/v1/{path:path}", guard.open(self._refuse), methods=["POST"]),
            ],
            exception_handlers=guard.handlers,
        )

    async def _health(self, request: Request) -> Response:
        return JSONResponse({})

    async def _models(self, request: Request) -> Response:
        return models_response(self._name, self._scorer.record.max_length)

    async def _refuse(self, request: Request) -> Response:
        raise RequestError(
            f"{self._name} is a reward model: it scores at /classify, and writes no text", status=404
        )

    async def _classify(self, request: Request) -> Response:
        fields = RequestFields(await read_body(request))
        sequences = self._sequences(fields)
        if fields.text("model") not in (None, self._name):
            raise RequestError(f"this server has the model {self._name!r}", "model", status=404)
        fields.refuse_unread()
        scores = await run_in_threadpool(self._scorer.score_tokens, sequences)
        data = [
            {"index": index, "label": "LABEL_0", "probs": [score], "num_classes": 1}
            for index, score in enumerate(scores.tolist())
        ]
        count = sum(map(len, sequences))
        return JSONResponse(
            {
                "id": f"classify-{secrets.token_hex(12)}",
                "object": "list",
                "created": int(time.time()),
                "model": self._name,
                "data": data,
                "usage": {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0},
            }
        )

    def _sequences(self, fields: RequestFields) -> list[np.ndarray]:
        """What is scored: `messages`, or `input`, which is a text or token ids, or a list of either."""
        messages = fields.value("messages")
        if messages is not None:
            return [self._conversation(messages, fields)]
        value = fields.value("input")
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(item, int) for item in values):
            values = [values]
        if not 0 < len(values) <= _MOST_INPUTS:
            raise RequestError(f"input has from 1 to {_MOST_INPUTS} texts, or lists of token ids", "input")
        return [self._tokens(item) for item in values]

    def _conversation(self, messages: Any, fields: RequestFields) -> np.ndarray:
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages is a list of at least one message", "messages")
        turns = [
            read_turn(turn, f"messages[{place}]") for place, turn in enumerate(cast("list[Any]", messages))
        ]
        tools = read_tools({"tools": fields.value("tools")}, "tools")
        conversation = Conversation(tuple(turns), tools, origin="messages")
        request = ScoreRequest(conversation, fields.text("condition"), prompt_of(conversation))
        scorer = self._scorer
        inputs = RewardInputs(scorer.loaded.tokenizer, scorer.record, scorer.template)
        return inputs.make([request])[0]

    def _tokens(self, item: Any) -> np.ndarray:
        tokenizer: Any = self._scorer.loaded.tokenizer
        ids = encode_text(tokenizer, item) if isinstance(item, str) and item else item
        if not isinstance(ids, list) or not ids:
            raise RequestError("input is a text, token ids, or a list of either; none is empty", "input")
        size = len(tokenizer)
        if not all(isinstance(token, int) and 0 <= token < size for token in ids):
            raise RequestError(f"the token ids of input are whole numbers below {size:,}", "input")
        return np.array(ids, dtype=np.int32)
