"""Chat templates: a conversation as one text, and the spans of it that the loss is taken on.

A template is a Jinja file as transformers reads it, run in Jinja's sandbox. Assistant turns are marked by
`{% generation %}`. Where a template has no marks (as in most tokenizers), spans are found by rendering prefixes.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from operator import is_
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jinja2

from tuner.config.data import Reading
from tuner.data.control_tokens import BLANKED, MARKED, ControlTokens, Spelled
from tuner.data.conversation import REFERENCE, Conversation, ToolCall, Turn
from tuner.data.encoding import Tokenizer, adds_bos, is_one_token
from tuner.data.lost_content import THOUGHT_END, LostContentError, check_nothing_is_lost
from tuner.data.rendered import Rendered, encode
from tuner.data.template_program import ENVIRONMENT, MarkedText, compiled, extract_marks, reason
from tuner.data.turns import message_of
from tuner.errors import UserError
from tuner.resources import chat_templates_folder

Learn = Literal["assistant", "last", "all"]

_SETS_TEXT_BOS = "{%- set text_bos = bos_token -%}"
_OPENED_THOUGHT = re.compile(r"(<think>)(\s*)$")
"""How a header ends that opens a thought: its tag, and the white space behind it."""
_THOUGHTFUL = "<think>\nt\n</think>\n\nb"
_STAND_IN = "".join(secrets.choice("0123456789") for _ in range(40))
"""Takes the place of a turn's content, to find what a template writes behind it; random, as the marks are."""


class ChangedTurnError(UserError):
    """A template renders a learned turn differently once others follow."""


class Template:
    """A chat template for one tokenizer.

    Raises UserError when it is unknown, is no Jinja, or needs special tokens that the tokenizer splits.
    """

    def __init__(
        self, name: str, tokenizer: Tokenizer, spelled_tokens: Mapping[str, Reading] = MappingProxyType({})
    ):
        """spelled_tokens: how some added tokens are read where a turn's text spells them; see ControlTokens."""
        self.name = name
        self.source = find_source(name, tokenizer)
        self._tokenizer = tokenizer
        self.needs_reference = f"== '{REFERENCE}'" in self.source
        """Whether it compares an answer with a reference; see Conversation.with_reference."""
        self._marked = bool(re.search(r"{%-?\s*generation\b", self.source))
        try:
            self._jinja = compiled(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"template {name!r}, line {error.lineno}: {error.message}; correct the template"
            ) from error
        except Exception as error:  # constants are computed here; see _render
            raise UserError(f"template {name!r}: {reason(error)}; correct the template") from error
        self._values = self._special_values()
        self._check_special_tokens("special tokens")
        self._extras_checked = not re.search(r"with tools or names:", self.source)
        self.control = ControlTokens(tokenizer, *self._written(), spelled_tokens)
        self.opens_thought, self._changes_turns = self._probe()

    @property
    def published(self) -> str:
        """The source for other tools, which render the same text with it: they do not know our variable `text_bos`."""
        if not self._values["text_bos"] or "text_bos" not in self.source or _SETS_TEXT_BOS in self.source:
            return self.source
        return _SETS_TEXT_BOS + self.source

    def render(self, conversation: Conversation, learn: Learn = "assistant") -> Rendered:
        """The conversation as text with the spans that the loss is taken on.

        learn: on every assistant turn, the last one, or everything; a turn's own `learn` and `weight` override it.
        Raises UserError with the row's origin when the template refuses the row, and ChangedTurnError where `views`
        would split it.
        """
        turns = conversation.turns
        weights = _weights(conversation, learn)
        if self.opens_thought and turns and turns[-1].role == "assistant":
            text, last_span, spelled = self._render_behind_header(conversation, bool(weights[-1]))
            spans_known = {len(turns) - 1: last_span}
        else:
            text, spans_known, spelled = self._render_marked(conversation)
        spans = [(0, len(text), conversation.weight)] if learn == "all" else []
        learned: dict[int, tuple[int, int]] = {}
        for index, (turn, weight) in enumerate(zip(turns, weights, strict=True)):
            if weight == (conversation.weight if learn == "all" else 0):
                if weight:  # its tokens already have this weight
                    learned[index] = spans_known.get(index, (0, len(text)))
                continue
            # under learn="all", a user turn of weight 0 is masked with its header
            whole_turn = not weight and turn.role != "assistant"
            span = spans_known.get(index) or self._span_by_prefix(conversation, index, text, whole_turn)
            spans.append((*span, weight))
            if weight:
                learned[index] = span
        return Rendered(text, spans, conversation.origin, learned, self._spelled(spelled))

    def render_row(self, conversation: Conversation, learn: Learn = "assistant") -> Rendered:
        """As `render`; raises LostContentError where the text lacks something of the row."""
        rendered = self.render(conversation, learn)
        self._check_nothing_is_lost(conversation, rendered)
        return rendered

    def render_prompt_row(self, conversation: Conversation) -> Rendered:
        """As `render_header`; raises LostContentError where the text lacks something of the row."""
        rendered = self.render_header(conversation)
        self._check_nothing_is_lost(conversation, rendered)
        return rendered

    def views(self, conversation: Conversation, learn: Learn = "assistant") -> list[Conversation]:
        """The conversations to render in place of one, so that the loss is on every learned turn as generated.

        Where the template renders a learned turn differently once others follow, there is one for each: the turns up to
        it, of which only it is learned. Otherwise it is the conversation itself.
        """
        learned = [index for index, weight in enumerate(_weights(conversation, learn)) if weight]
        if not self._changes_turns or learn == "all" or learned in ([], [len(conversation.turns) - 1]):
            return [conversation]
        try:
            self.render_row(conversation, learn)
        except (ChangedTurnError, LostContentError):
            return [_view(conversation, index) for index in learned]
        return [conversation]

    def render_header(self, conversation: Conversation) -> Rendered:
        """The conversation as text that ends with the header of the assistant's next turn."""
        text, _, spelled = self._render(conversation, header=True)
        return Rendered(text, [], conversation.origin, spelled=self._spelled(spelled))

    def prompt_text(self, conversation: Conversation) -> str:
        """The text of `render_header`."""
        return self.render_header(conversation).text

    def render_prompt(self, conversation: Conversation) -> list[int]:
        """Token ids of the conversation and the header of the assistant's next turn."""
        return encode(self._tokenizer, [self.render_header(conversation)])[0]

    @property
    def example(self) -> Conversation:
        """A question and an answer in the form this template learns from."""
        answer = _THOUGHTFUL if self.opens_thought else "b"
        return Conversation((Turn("user", "a"), Turn("assistant", answer)), origin="end of an answer")

    def check_answers_end(self) -> None:
        """Raise UserError where nothing that is learned of an answer would tell the model to stop."""
        try:
            rendered = self.render(self.example)
        except UserError:  # it cannot render so plain a conversation; the rows will show what it can
            return
        start, end = rendered.learned[1]
        if rendered.text[start:end].rstrip().endswith(self.example.turns[1].content[-1]):
            raise UserError(
                f"template {self.name!r} has nothing in the loss behind an answer but white space, so a model would "
                "never learn to stop; end the assistant's turns with {{ eos_token }} or another end token"
            )

    def _check_nothing_is_lost(self, conversation: Conversation, rendered: Rendered) -> None:
        check_nothing_is_lost(
            conversation,
            rendered.text,
            rendered.learned,
            self.name,
            lambda: self._ignores_tools(conversation),
        )

    def _ignores_tools(self, conversation: Conversation) -> bool:
        """Whether a conversation's text is the same without its tools."""
        try:
            return self._render(conversation).text == self._render(replace(conversation, tools=())).text
        except UserError:  # it needs them
            return False

    def _spelled(self, starts: frozenset[int]) -> Spelled | None:
        return Spelled(self.control, starts) if starts else None

    def _render_marked(
        self, conversation: Conversation
    ) -> tuple[str, dict[int, tuple[int, int]], frozenset[int]]:
        """(text, turn -> its marked span, first characters of spelled control tokens)."""
        text, marks, spelled = self._render(conversation)
        answers = [index for index, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        if self._marked and len(marks) != len(answers):
            raise UserError(
                f"{conversation.origin}: template {self.name!r} marked {len(marks)} parts with {{% generation %}} for "
                f"{len(answers)} assistant turns; put one around every assistant turn"
            )
        return text, dict(zip(answers, marks, strict=False)), spelled

    def _render_behind_header(
        self, conversation: Conversation, learned: bool
    ) -> tuple[str, tuple[int, int], frozenset[int]]:
        """As `_render_marked`, with the span of the last turn alone, written behind a header that opens a thought.

        Such templates cut the thought from the turns they render. Raises UserError where a learned turn has none.
        """
        *before, turn = conversation.turns
        header, _, spelled = self._render(conversation, tuple(before), header=True)
        ended, _, spelled_in_ended = self._render(conversation, (*before, replace(turn, content=_STAND_IN)))
        opening = _OPENED_THOUGHT.search(header)
        assert opening
        content = turn.content.lstrip()
        if content.startswith(opening[1]):
            content = content.removeprefix(opening[1]).removeprefix(opening[2])
        elif learned and THOUGHT_END not in content:
            raise UserError(
                f"{conversation.origin}: turn {len(before) + 1} (assistant): template {self.name!r} begins answers "
                f"with {opening[1]}, and this one has no reasoning; write it as {opening[1]}...{THOUGHT_END}, or use "
                "another template"
            )
        before_content, written, behind = ended.partition(_STAND_IN)
        if not written:
            raise LostContentError(
                f"{conversation.origin}: template {self.name!r} does not write what the assistant says; use another",
                "text",
            )
        text = header + content + behind
        in_content = self.control.spelled(content, answer=True)
        content_end = len(before_content) + len(_STAND_IN)
        spelled |= {len(header) + start for start in (in_content.starts if in_content else ())}
        spelled |= {
            len(header) + len(content) + start - content_end
            for start in spelled_in_ended
            if start >= content_end
        }
        return text, (len(header), len(text.rstrip())), spelled

    def _probe(self) -> tuple[bool, bool]:
        """(whether the header of an answer opens a thought, whether earlier turns change once others follow)."""
        question, thought = Turn("user", "a"), Turn("assistant", _THOUGHTFUL)
        try:
            header = self._render(Conversation((question,)), header=True).text
            first = self._render(Conversation((question, thought))).text
            both = self._render(Conversation((question, thought, question, thought))).text
        except UserError:  # it takes no such conversation
            return False, False
        opens = bool(_OPENED_THOUGHT.search(header)) and not first.startswith(header)
        return opens, opens or not both.startswith(first)

    def _render(
        self, conversation: Conversation, turns: tuple[Turn, ...] | None = None, header: bool = False
    ) -> MarkedText:
        """turns: in place of the conversation's. header: append that of an assistant turn."""
        turns = conversation.turns if turns is None else turns
        if not self._extras_checked and (
            conversation.tools or any(turn.name or turn.tool_calls for turn in turns)
        ):
            self._check_special_tokens("with tools or names")
            self._extras_checked = True
        tools, origin = list(conversation.tools), conversation.origin
        messages = [message_of(turn) for turn in turns]
        text = extract_marks(self._write(messages, tools, header, origin))

        def rewritten(into: str) -> tuple[list[dict[str, Any]], list[Any]]:
            rewrite = self.control.rewrite_message
            return [rewrite(message, into) for message in messages], self.control.rewrite_values(tools, into)

        marked_messages, marked_tools = rewritten(MARKED)
        if marked_tools == tools and all(map(is_, messages, marked_messages)):
            return text
        marked = extract_marks(
            self._write(marked_messages, marked_tools, header, origin), self.control.readings
        )
        blanked = extract_marks(self._write(*rewritten(BLANKED), header, origin))
        # A template that cuts texts may cut a mark. One that takes parts out may join others to a control token: then
        # there are more than it writes itself.
        count = self.control.count_others
        if marked.text != text.text or count(text.text, marked.spelled) > count(blanked.text):
            raise UserError(
                f"{origin}: a turn spells a control token, and template {self.name!r} rewrites texts, so it cannot be "
                "told from the template's own; take it out of the row, or use another template"
            )
        return marked

    def _write(self, messages: list[dict[str, Any]], tools: list[Any], header: bool, origin: str) -> str:
        ENVIRONMENT.start()
        try:
            return self._jinja.render(
                messages=messages,
                # None, not []: templates test `tools is not none`, and would announce an empty list
                tools=tools or None,
                add_generation_prompt=header,
                **self._values,
            )
        # a template is a program of its author's: it may raise whatever Python can
        except Exception as error:
            raise UserError(
                f"{origin}: template {self.name!r} cannot render this conversation: {reason(error)}"
            ) from error

    def _written(self) -> tuple[str, list[str]]:
        """(a conversation as the template writes it, some whose answers are a call and a thought); "" for what it
        cannot write."""
        system, user, answer = ({"role": role, "content": "7"} for role in ("system", "user", "assistant"))
        call = message_of(Turn("assistant", "", tool_calls=(ToolCall("f", {"x": 7}, id="7" * 9),)))
        thought = answer | dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "7")

        def write(*messages: dict[str, Any], header: bool = False) -> str:
            try:
                return self._write(list(messages), [], header, "")
            except UserError:
                return ""

        plain = write(system, user, answer, user, header=True) or write(user, answer, user, header=True)
        return plain, [write(user, call), write(user, thought)]

    def _span_by_prefix(
        self, conversation: Conversation, index: int, text: str, whole_turn: bool
    ) -> tuple[int, int]:
        """(first character, one past the last) of turn `index`, from the texts rendered up to it and through it.

        An assistant turn begins after its header, any other at the first character of its content, or at its header
        with whole_turn. The span ends before trailing white space, except with whole_turn.
        """
        turns, turn = conversation.turns, conversation.turns[index]
        before = self._render(conversation, turns[:index], turn.role == "assistant").text if index else ""
        through = self._render(conversation, turns[: index + 1]).text
        if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
            raise ChangedTurnError(
                f"{conversation.origin}: template {self.name!r} is not prefix-stable: it renders turn "
                f"{index + 1} ({turn.role}) differently when others follow, so its span is unknown; "
                f'learn the last turn alone (learn="last"), or use one of {", ".join(names())}'
            )
        # the loss is not taken on the line break behind the end token: generation stops before it
        begin, end = len(before), len(through.rstrip())
        if turn.role != "assistant" and not whole_turn:
            # stripped, as many templates write a turn's content
            begin = text.find(turn.content.strip(), begin)
            if begin < 0 or begin > end:
                raise UserError(
                    f"{conversation.origin}: template {self.name!r} rewrites turn {index + 1} ({turn.role}), "
                    'so its span in the text is unknown; take out its "learn" and "weight"'
                )
        return begin, len(through) if whole_turn else end

    def _special_values(self) -> dict[str, Any]:
        """The tokenizer's variables that transformers passes to templates, and ours.

        text_bos: the begin token where the tokenizer itself puts it before text. reward_token_follows: templates saved
        with reward models write their reward token for other tools; here it follows as an id.
        """
        tokenizer = self._tokenizer
        if "eos_token" in self.source and tokenizer.eos_token is None:
            raise UserError(
                f"template {self.name!r} ends answers with the end token, and the tokenizer has none; set it"
            )
        special = {
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        bos = tokenizer.bos_token or ""
        text_bos = bos if adds_bos(tokenizer) else ""
        return {**special, "bos_token": bos, "text_bos": text_bos, "reward_token_follows": True}

    def _check_special_tokens(self, heading: str) -> None:
        """Every token listed under `heading` in the template file's comment must be a single token; else UserError."""
        line = re.search(rf"{heading}: (.+)", self.source) if self.name != "tokenizer" else None
        tokens = line[1].split() if line else []
        if split := [token for token in tokens if not is_one_token(self._tokenizer, token)]:
            raise UserError(
                f"template {self.name!r} needs {', '.join(split)}, which this tokenizer splits into pieces; "
                "use the template of the model's family, or add the tokens to the tokenizer"
            )


def names() -> list[str]:
    """The templates that come with tuner."""
    return sorted(file.stem for file in chat_templates_folder().glob("*.jinja"))


def find_source(name: str, tokenizer: Tokenizer) -> str:
    """The text of a template by the config's name: one of ours, a .jinja file, or "tokenizer" for the tokenizer's."""
    if name == "tokenizer":
        templates: str | Mapping[str, str] | None = getattr(tokenizer, "chat_template", None)
        source = templates.get("default") if isinstance(templates, Mapping) else templates
        if not source:
            raise UserError(
                f"this model's tokenizer has no chat template; set data.template to one of {', '.join(names())}"
            )
        return source
    file = Path(name) if name.endswith(".jinja") else chat_templates_folder() / f"{name}.jinja"
    if not file.is_file():
        raise UserError(
            f'template {name!r}: no such template; write "tokenizer", a .jinja file, or one of {", ".join(names())}'
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"template {name!r}: cannot be read as UTF-8 ({error}); save it as such") from error


def _weights(conversation: Conversation, learn: Learn) -> list[float]:
    """Loss weight of every turn: by its own `learn`, or else by the config's, and the row's factor."""
    turns = conversation.turns
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=None)

    def weight(index: int, turn: Turn) -> float:
        if turn.learn is not None:
            return turn.weight if turn.learn else 0.0
        in_loss = learn == "all" or (turn.role == "assistant" if learn == "assistant" else index == last)
        return turn.weight if in_loss else 0.0

    return [weight(index, turn) * conversation.weight for index, turn in enumerate(turns)]


def _view(conversation: Conversation, index: int) -> Conversation:
    """The turns up to one of them, of which only that one is learned."""
    before = (replace(turn, learn=False) for turn in conversation.turns[:index])
    return replace(conversation, turns=(*before, replace(conversation.turns[index], learn=True)))
