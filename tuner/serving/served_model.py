"""The model that is served: from the fields of a request to rows, with its template, ends and longest row."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from tuner.data.conversation import Conversation
from tuner.data.encoding import encode_text
from tuner.data.rendered import encode
from tuner.data.tool_calls import ToolFormat, as_trained, call_beginning
from tuner.data.turns import read_tools, read_turn
from tuner.errors import UserError
from tuner.models.answer_text import AnswerText
from tuner.models.chat import ChatModel
from tuner.models.live_batch import RowSettings
from tuner.models.positions import longest_row
from tuner.serving.answer_row import AnswerRow, Piece
from tuner.serving.request_fields import RequestError, RequestFields

_MOST_ROWS = 256
"""Answers of one request."""
_COLDEST = 1e-5
"""Below it decoding is greedy, as in vLLM: logits would overflow."""
_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens in completions."""


@dataclass(frozen=True)
class AnswerRequest:
    """What is to be generated for one request."""

    prompts: Sequence[Sequence[int]]
    n: int
    """Answers to each prompt."""
    settings: RowSettings
    seed: int
    stops: Sequence[str]
    has_logprobs: bool
    stream: bool
    counts_usage: bool
    """Whether a stream ends with its token counts."""
    shows_ids: bool
    """Whether token ids are part of the response, as in vLLM's."""
    tool_format: ToolFormat | None = None
    """How calls are read; None: they are not."""
    beginning: str = ""
    """What the answer has been made to begin with: its text, besides what is generated."""
    echo: bool = False
    """Whether the prompt is part of the text."""


class ServedModel:
    """A chat model under a name, and the requests that it can answer."""

    def __init__(self, chat: ChatModel, name: str, *, max_length: int | None, max_new_tokens: int) -> None:
        """max_length: tokens of prompt and answer together; None: as many as the model was trained for.

        max_new_tokens: of an answer whose request names no number.
        """
        self.chat, self.name, self._max_new_tokens = chat, name, max_new_tokens
        longest = longest_row(chat.loaded.transformer)
        if max_length is not None and longest is not None and max_length > longest:
            raise UserError(f"--max-length {max_length:,}: this model's rows have at most {longest:,} tokens")
        self.max_length = max_length or longest

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.chat.loaded.tokenizer

    def read_chat(self, fields: RequestFields) -> AnswerRequest:
        """A request of /v1/chat/completions. Raises RequestError, and UserError where the template refuses it."""
        self._check_model(fields)
        conversation, forced = self._conversation(fields)
        header = self.chat.template.render_prompt_row(conversation)
        beginning = self._beginning(forced)
        # encoded as one text, as training has it
        prompt = encode(self._tokenizer, [replace(header, text=header.text + beginning)])[0]
        logprobs = fields.flag("logprobs")
        num_likeliest = fields.whole("top_logprobs", 0, 20, 0) or 0
        if num_likeliest and not logprobs:
            raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
        # OpenAI's new name and its old one
        names = ("max_completion_tokens", "max_tokens")
        limits = [fields.whole(name, 1, 2**31, None) for name in names]
        most = limits[0] or limits[1]
        request = self._request(fields, [prompt], most, self._max_new_tokens, num_likeliest, logprobs)
        reads_calls = conversation.tools and self.chat.tool_format is not None
        return replace(
            request, tool_format=self.chat.tool_format if reads_calls else None, beginning=beginning
        )

    def read_completion(self, fields: RequestFields) -> AnswerRequest:
        """A request of /v1/completions. Raises RequestError."""
        self._check_model(fields)
        prompts = self._prompts(fields.value("prompt"))
        num_likeliest = fields.whole("logprobs", 0, 20, None)
        echo = fields.flag("echo")
        most = fields.whole("max_tokens", 0 if echo else 1, 2**31, None)
        request = self._request(
            fields, prompts, most, _COMPLETION_TOKENS, num_likeliest or 0, num_likeliest is not None
        )
        return replace(request, echo=echo)

    def rows(self, request: AnswerRequest, send: Callable[[Piece], None]) -> list[AnswerRow]:
        """The rows of a request, the answers to a prompt next to each other."""
        shown = self.chat.shown_ids
        return [
            AnswerRow(
                place * request.n + number,
                prompt,
                request.settings,
                seed=request.seed,
                ends=self.chat.end_ids,
                text=AnswerText(self.tokenizer, request.stops, shown),
                shown=shown,
                send=send,
                scores_prompt=request.echo and request.has_logprobs,
            )
            for place, prompt in enumerate(request.prompts)
            for number in range(request.n)
        ]

    def text_of(self, token: int) -> str:
        """A token by itself."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    @property
    def _tokenizer(self) -> Any:  # the data layer's own type of tokenizers
        return self.tokenizer

    def _check_model(self, fields: RequestFields) -> None:
        name = fields.text("model")
        if name not in (None, self.name):
            raise RequestError(
                f"the model {name!r} does not exist; this server has {self.name!r}",
                "model",
                status=404,
                code="model_not_found",
            )

    def _conversation(self, fields: RequestFields) -> tuple[Conversation, str | None]:
        """The conversation, and the name of the tool that must be called; "" for any, None for no such demand."""
        messages = fields.value("messages")
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages is a list of at least one message", "messages")
        if fields.value("parallel_tool_calls") is False:
            raise RequestError(
                "parallel_tool_calls=false is not supported by this server", "parallel_tool_calls"
            )
        tools = read_tools({"tools": fields.value("tools")}, "tools")
        choice = fields.value("tool_choice")
        forced = _forced_tool(choice, [str(tool["function"]["name"]) for tool in tools])
        if choice == "none":
            tools = ()
        turns = [
            read_turn(message, f"messages[{place}]")
            for place, message in enumerate(cast("list[Any]", messages))
        ]
        turns = as_trained(turns, self.chat.tool_format)
        return Conversation(tuple(turns), tools, origin="messages"), forced

    def _beginning(self, forced: str | None) -> str:
        """What makes an answer a call."""
        if forced is None:
            return ""
        beginning = call_beginning(self.chat.template, forced or None)
        if beginning is None or self.chat.tool_format is None:
            raise RequestError(
                "this model's template writes no tool calls; leave tool_choice out", "tool_choice"
            )
        return beginning

    def _prompts(self, value: Any) -> list[list[int]]:
        """The prompts of a completion: a text or token ids, or a list of either."""
        values = value if isinstance(value, list) else [value]
        values = [values] if values and all(isinstance(item, int) for item in values) else values
        prompts = [encode_text(self._tokenizer, item) if isinstance(item, str) else item for item in values]
        size = len(self.tokenizer)
        for prompt in prompts:
            is_ids = isinstance(prompt, list) and all(
                isinstance(token, int) and not isinstance(token, bool) and 0 <= token < size
                for token in prompt
            )
            if not is_ids or not prompt:
                raise RequestError(
                    f"prompt is a text, token ids below {size:,}, or a list of either; none is empty",
                    "prompt",
                )
        if not prompts:
            raise RequestError("prompt is an empty list", "prompt")
        return prompts

    def _request(
        self,
        fields: RequestFields,
        prompts: list[list[int]],
        most: int | None,
        default: int,
        num_likeliest: int,
        has_logprobs: bool,
    ) -> AnswerRequest:
        """What both kinds of requests have in common; `most` is the request's number of tokens."""
        n = fields.whole("n", 1, _MOST_ROWS, 1) or 1
        if n * len(prompts) > _MOST_ROWS:
            raise RequestError(f"{n * len(prompts)} answers; a request has at most {_MOST_ROWS}", "n")
        temperature = fields.number("temperature", 0.0, 100.0, 1.0)
        settings = RowSettings(
            max_new_tokens=self._new_tokens(prompts, most, default),
            temperature=temperature if temperature >= _COLDEST else 0.0,
            top_p=fields.number("top_p", 0.0, 1.0, 1.0),
            top_k=_top_k(fields),
            num_likeliest=num_likeliest,
        )
        seed = fields.whole("seed", -(2**63), 2**63 - 1, None)
        options = RequestFields(fields.value("stream_options") or {})
        return AnswerRequest(
            prompts=prompts,
            n=n,
            settings=settings,
            seed=secrets.randbits(63) if seed is None else seed % 2**64,
            stops=fields.texts("stop", 16),
            has_logprobs=has_logprobs,
            stream=fields.flag("stream"),
            counts_usage=options.flag("include_usage"),
            shows_ids=fields.flag("return_token_ids"),
        )

    def _new_tokens(self, prompts: Sequence[Sequence[int]], most: int | None, default: int) -> int:
        longest = max(map(len, prompts))
        if self.max_length is None:
            return default if most is None else most
        room = self.max_length - longest
        if room < (1 if most is None else most):
            wanted = f"and {most:,} for the answer" if most is not None and room > 0 else "and an answer"
            raise RequestError(
                f"this model's rows have at most {self.max_length:,} tokens, and the prompt has {longest:,} {wanted} "
                "is asked for; shorten the messages or lower max_tokens",
                "messages",
                code="context_length_exceeded",
            )
        return min(default, room) if most is None else most


def _top_k(fields: RequestFields) -> int | None:
    """vLLM's field: 0 and -1 are all tokens."""
    return max(fields.whole("top_k", -1, 2**31, 0) or 0, 0) or None


def _forced_tool(choice: Any, names: Sequence[str]) -> str | None:
    """The tool that must be called: "" for any, None where the model decides. Raises RequestError for others."""
    if choice in (None, "auto", "none"):
        return None
    if choice == "required" and names:
        return ""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if isinstance(name, str) and name in names:
        return name
    raise RequestError(
        'tool_choice is "none", "auto", "required", or {"type": "function", "function": {"name": ...}} of one of the '
        "tools",
        "tool_choice",
    )
