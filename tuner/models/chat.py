"""Chat with a model: from a conversation so far to the text of the next answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tuner.config import Model
from tuner.data.conversation import Conversation, ToolCall, Turn
from tuner.data.examples import tokenize
from tuner.data.rendered import encode
from tuner.data.template import Template
from tuner.data.tool_calls import AnswerReader, ToolFormat, as_trained, identified, tool_format_of
from tuner.errors import UserError
from tuner.models.generate import stream
from tuner.models.load import Loaded, load_model
from tuner.models.locate import locate


@dataclass(frozen=True)
class ChatModel:
    """A loaded model with its chat template."""

    loaded: Loaded
    template: Template
    end_ids: frozenset[int]
    """Tokens that end an answer."""

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the template writes calls of tools; None where it writes none."""
        return tool_format_of(self.template)

    @cached_property
    def shown_ids(self) -> frozenset[int]:
        """Special tokens that are part of an answer's text, as those around calls: of the turn that is sent back, the
        template makes the same tokens."""
        readings = self.template.control.readings
        tokenizer: Any = self.loaded.tokenizer
        return frozenset(
            tokenizer.convert_tokens_to_ids(name) for name, reading in readings.items() if reading != "text"
        )

    def reply(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = (), **sampling: Any
    ) -> Iterator[str | ToolCall]:
        """As `answer`, with calls of the tools told from the text; without tools, calls stay as they are written."""
        reader = AnswerReader(self.tool_format if tools else None)
        for piece in self.answer(as_trained(turns, self.tool_format), tools=tools, **sampling):
            yield from map(identified, reader.push(piece))
        yield from map(identified, reader.finish())

    def answer(
        self,
        turns: Sequence[Turn],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Iterator[str]:
        """The text of the next answer, piece by piece; greedy at temperature 0."""
        conversation = Conversation(tuple(turns), tuple(tools), origin="chat")
        prompt = encode(self.loaded.tokenizer, [self.template.render_prompt_row(conversation)])[0]  # pyright: ignore[reportArgumentType]
        return stream(
            self.loaded.model,
            self.loaded.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            end_ids=self.end_ids,
            shown=self.shown_ids,
        )


def open_chat(
    path: str, *, template: str = "tokenizer", device: torch.device | None = None, trust: bool = False
) -> ChatModel:
    """Load a run, model folder or hub name to chat with. Raises UserError when it is missing or has no template.

    trust: let the model run Python code of its own.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model(path=path, trust_remote_code=trust)
    # the run's own: weights are rounded to it before they are quantized, so another gives another base
    precision = locate(model, weights=False).precision
    loaded = load_model(model, precision=precision, device=device, train=False)
    chat_template = Template(template, loaded.tokenizer)  # pyright: ignore[reportArgumentType]
    ends = end_ids(chat_template, loaded.tokenizer) | _declared_ends(loaded)
    return ChatModel(loaded, chat_template, ends)


def answer_ends(loaded: Loaded) -> frozenset[int]:
    """Tokens that end an answer of a model with the chat template it carries, in `tuner chat` as in other tools; the
    model's own and the tokenizer's end of text where it carries none."""
    tokenizer: Any = loaded.tokenizer
    ends = {tokenizer.eos_token_id} - {None}
    if getattr(tokenizer, "chat_template", None):
        with suppress(
            UserError
        ):  # a base's template may refuse a plain conversation, and the rows were no chat
            ends = end_ids(Template("tokenizer", tokenizer), tokenizer)
    return _declared_ends(loaded) | ends


def _declared_ends(loaded: Loaded) -> frozenset[int]:
    """End tokens of the model's generation_config.json: released models have some that no template shows."""
    ends = loaded.transformer.generation_config.eos_token_id
    return frozenset(() if ends is None else ends if isinstance(ends, list) else [ends])


def end_ids(template: Template, tokenizer: object) -> frozenset[int]:
    """Tokens that end an answer: the last token that loss is taken on in this template, and the tokenizer's end of
    text."""
    # read off a rendered example: many templates end a turn with another token than the tokenizer's end of
    # text (InternLM2: <|im_end|> and </s>), and a model that stops at the latter alone talks past its turn
    tokens, weights = tokenize([template.render(template.example)], tokenizer)[0]  # type: ignore[arg-type]
    end = int(tokens[weights.nonzero()[0][-1]])
    eos = getattr(tokenizer, "eos_token_id", None)
    return frozenset({end} | ({eos} if eos is not None else set()))
