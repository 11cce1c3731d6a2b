"""Answers of a model that may run Python: its blocks are executed, and their output is its next turn to read.

Where the chat template writes names of turns and the tokenizer has InternLM2's tokens, in InternLM2's format
(chat_format.md of InternLM): `<|action_start|><|interpreter|>` before a block, `<|action_end|>` behind it, and the
output in a turn of the environment. For other models a block is fenced Python at the end of an answer, and the output
comes from the user.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.data.conversation import Conversation, Turn
from tuner.data.encoding import is_one_token
from tuner.errors import UserError
from tuner.evaluation.interpreter import Interpreter
from tuner.evaluation.task_model import TaskModel
from tuner.evaluation.task_rows import TaskRow

NAME = "<|interpreter|>"
_CALL = re.compile(
    rf"<\|action_start\|>{re.escape(NAME)}\s*```(?:python)?\n(.*?)```\s*<\|action_end\|>", re.DOTALL
)
_FENCED = re.compile(r"```python\n(.*?)```\s*\Z", re.DOTALL)
_INSTRUCTION = (
    "You can run Python code, and will be shown what it prints. Write it as\n{call}\nand wait for the output."
)
_FENCE = "```python\ncode\n```"


@dataclass(frozen=True)
class InterpreterAnswers:
    """Answers each row, with up to `rounds` blocks run for it; an `Answerer` of local tasks."""

    interpreter: Interpreter
    rounds: int = 4

    def __call__(self, model: TaskModel, rows: Sequence[TaskRow], max_new_tokens: int) -> list[str]:
        """The last turn of every conversation. Raises UserError for a model without a chat template."""
        if model.template is None:
            raise UserError(
                "--interpreter: a model runs code over several turns, so it needs a chat template"
            )
        form = _Form.of(model)
        conversations = {place: form.begin(row) for place, row in enumerate(rows)}
        answers: dict[int, str] = {}
        for _ in range(self.rounds + 1):
            if not conversations:
                break
            places = list(conversations)
            prompts = [model.encode(model.prompt_text(conversations[place])) for place in places]
            texts = model.answers(prompts, max_new_tokens, special_tokens=True)
            answers |= zip(places, texts, strict=True)
            calls = {place: code for place in places if (code := form.code(answers[place])) is not None}
            conversations = {
                place: form.continued(conversations[place], answers[place], self.interpreter.run(code))
                for place, code in calls.items()
            }
        return [answers[place] for place in range(len(rows))]


@dataclass(frozen=True)
class _Form:
    """How a family of models calls the interpreter."""

    internlm2: bool

    @classmethod
    def of(cls, model: TaskModel) -> _Form:
        assert model.template is not None
        named = Conversation((Turn("user", "a"), Turn("environment", "b", name=NAME)))
        try:
            has_names = f"name={NAME}" in model.template.prompt_text(named)
        except UserError:  # it takes no such turn
            has_names = False
        return cls(has_names and is_one_token(model.loaded.tokenizer, "<|action_start|>"))  # type: ignore[arg-type]

    def begin(self, row: TaskRow) -> Conversation:
        """A row's prompt with the instruction, which InternLM2 has in a system turn of its own."""
        conversation = row.prompt.policy_input()
        if not self.internlm2:
            return conversation.prepend_system(_INSTRUCTION.format(call=_FENCE))
        text = _INSTRUCTION.format(call=f"<|action_start|>{NAME}\n{_FENCE}<|action_end|>")
        turns = conversation.turns
        opening = 1 if turns[0].role == "system" else 0
        return Conversation(
            (*turns[:opening], Turn("system", text, name=NAME), *turns[opening:]),
            conversation.tools,
            origin=conversation.origin,
        )

    def code(self, answer: str) -> str | None:
        """The block that an answer ends with; None where it is a last answer."""
        call = _CALL.search(answer) if self.internlm2 else _FENCED.search(answer)
        return call[1] if call else None

    def continued(self, conversation: Conversation, answer: str, output: str) -> Conversation:
        """The conversation with the answer and the output of its block."""
        result = (
            Turn("environment", output, name=NAME) if self.internlm2 else Turn("user", f"Output:\n{output}")
        )
        turns = (*conversation.turns, Turn("assistant", answer), result)
        return Conversation(turns, conversation.tools, origin=conversation.origin)
