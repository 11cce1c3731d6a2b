"""Whatever a chat template holds: a conversation is rendered, or refused in a sentence.

Each case damages a shipped template, by a seed. `TUNER_FUZZ=5000 pytest THIS_FILE` tries more than CI does.
"""

import os
import random
import time
from pathlib import Path

from tuner.data.conversation import Conversation, ToolCall, Turn
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.resources import chat_templates_folder

CASES = int(os.environ.get("TUNER_FUZZ", "300"))
PIECES = (
    *("{%", "%}", "{{", "}}", "{#", "-%}", "{% endfor %}", "{% endif %}", "{% for x in messages %}", "{% else %}"),
    *("{% generation %}", "{% endgeneration %}", "{{ 1 / 0 }}", "{{ messages }}", "{{ x.y.z }}", "{{ x() }}"),
    *("{{ raise_exception('no') }}", "{{ messages | tojson }}", "{{ namespace() }}", "{% set x = [1] * 3 %}"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% break %}", "{{ 'a' * 10 ** 9 }}", "{% include 'x' %}"),
    *("{% import 'os' as os %}", "{{ messages.__class__ }}", "{{ '%s' % () }}", "{{ '{0.__class__}'.format(1) }}"),
    *("\x00", "\udc80", "é", "\n", "'", '"', "{{ messages[99].content }}", "{{ messages | sort }}", "{{ tools[0] }}"),
)  # fmt: skip
CONVERSATION = Conversation(
    (
        Turn("system", "Be brief."),
        Turn("user", "Hi"),
        Turn("assistant", "", tool_calls=(ToolCall("f", {"x": 1}),)),
        Turn("tool", "3", name="f"),
        Turn("assistant", "Three."),
    ),
    tools=(
        {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}},
    ),
    origin="x.jsonl:7",
)


def damaged(source: str, generator: random.Random) -> str:
    """A template with parts cut out, doubled, moved, or with pieces put in."""
    for _ in range(generator.randint(1, 3)):
        start, end = sorted(generator.randrange(len(source) + 1) for _ in range(2))
        end = min(end, start + generator.choice((1, 5, 80)))
        part, place = source[start:end], generator.randrange(len(source) + 1)
        kind = generator.randrange(4)
        if kind == 0:
            source = source[:start] + source[end:]
        elif kind == 1:
            source = source[:place] + part + source[place:]
        else:
            source = source[:place] + generator.choice(PIECES) + source[place:]
    return source


def test_damaged_templates_render_or_are_refused_in_a_sentence(tmp_path: Path, tokenizer: object) -> None:
    generator = random.Random(CASES)
    sources = [file.read_text(encoding="utf-8") for file in sorted(chat_templates_folder().glob("*.jinja"))]
    refusals, seconds = list[str](), list[float]()
    for _ in range(CASES):
        file = tmp_path / "damaged.jinja"
        file.write_bytes(damaged(generator.choice(sources), generator).encode("utf-8", "surrogatepass"))
        start = time.process_time()
        try:
            Template(str(file), tokenizer).render_row(CONVERSATION)  # type: ignore[arg-type]
        except UserError as error:
            refusals.append(str(error))
        seconds.append(time.process_time() - start)
    assert CASES // 5 < len(refusals) < CASES
    assert max(seconds) < 30  # of loops that end at their bound
