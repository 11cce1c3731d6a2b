"""Templates: texts and spans in the loss, by hand, against the published ones, and in parts."""

import itertools
import json
import random
from importlib.resources import files

import numpy as np
import pytest

from tests.unit.data.conftest import CHINESE, make_tokenizer
from tuner.data import sandbox
from tuner.data.conversation import Conversation, ToolCall, Turn
from tuner.data.examples import tokenize
from tuner.data.template import Template, names
from tuner.errors import UserError

SYSTEM, HI, HELLO = Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello")
BYE, SEE_YOU = Turn("user", "Bye"), Turn("assistant", "See you")
CONVERSATION = Conversation((SYSTEM, HI, HELLO, BYE, SEE_YOU), origin="x.jsonl:1")

# Spans in the loss are in ⟦ ⟧. Written by hand from each family's documentation.
GOLDEN = {
    "internlm2": """<s><|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
⟦Hello<|im_end|>⟧
<|im_start|>user
Bye<|im_end|>
<|im_start|>assistant
⟦See you<|im_end|>⟧
""",
    "chatml": """<s><|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
⟦Hello<|im_end|>⟧
<|im_start|>user
Bye<|im_end|>
<|im_start|>assistant
⟦See you<|im_end|>⟧
""",
    "qwen": """<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
⟦Hello<|im_end|>⟧
<|im_start|>user
Bye<|im_end|>
<|im_start|>assistant
⟦See you<|im_end|>⟧
""",
    "llama3": """<s><|start_header_id|>system<|end_header_id|>

Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>

⟦Hello<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>

Bye<|eot_id|><|start_header_id|>assistant<|end_header_id|>

⟦See you<|eot_id|>⟧""",
    "mistral": """<s>[INST] Be brief.

Hi[/INST]⟦ Hello</s>⟧[INST] Bye[/INST]⟦ See you</s>⟧""",
    "gemma": """<s><start_of_turn>user
Be brief.

Hi<end_of_turn>
<start_of_turn>model
⟦Hello<end_of_turn>⟧
<start_of_turn>user
Bye<end_of_turn>
<start_of_turn>model
⟦See you<end_of_turn>⟧
""",
    "alpaca": """<s>Be brief.

### Instruction:
Hi

### Response:
⟦Hello</s>⟧

### Instruction:
Bye

### Response:
⟦See you</s>⟧""",
}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WITH_TOOLS = Conversation(
    (
        Turn("user", "天气？"),
        Turn("assistant", "", tool_calls=(ToolCall("weather", {"city": "上海"}, "abcdefghi"),)),
        Turn("tool", '{"t": 22}', call_id="abcdefghi"),
        Turn("assistant", "22度"),
    ),
    tools=(TOOL,),
    origin="x.jsonl:2",
)
GOLDEN_TOOLS = {
    "internlm2": """<s><|im_start|>system name=<|plugin|>
[
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {
                    "type": "string"
                }
            }
        }
    }
]<|im_end|>
<|im_start|>user
天气？<|im_end|>
<|im_start|>assistant
⟦<|action_start|><|plugin|>
{"name": "weather", "parameters": {"city": "上海"}}<|action_end|><|im_end|>⟧
<|im_start|>environment name=<|plugin|>
{"t": 22}<|im_end|>
<|im_start|>assistant
⟦22度<|im_end|>⟧
""",
    "llama3": """<s><|start_header_id|>user<|end_header_id|>

Given the following functions, please respond with a JSON for a function call with its proper arguments \
that best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\
Do not use variables.

{
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {
                    "type": "string"
                }
            }
        }
    }
}

天气？<|eot_id|><|start_header_id|>assistant<|end_header_id|>

⟦{"name": "weather", "parameters": {"city": "上海"}}<|eot_id|>⟧<|start_header_id|>ipython<|end_header_id|>

{"t": 22}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

⟦22度<|eot_id|>⟧""",
    "mistral": """<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", "parameters": \
{"type": "object", "properties": {"city": {"type": "string"}}}}}][/AVAILABLE_TOOLS][INST] 天气？[/INST]\
⟦[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "上海"}, "id": "abcdefghi"}]</s>⟧\
[TOOL_RESULTS] {"content": {"t": 22}, "call_id": "abcdefghi"}[/TOOL_RESULTS]⟦ 22度</s>⟧""",
}


def unmark(golden: str) -> tuple[str, list[str]]:
    """The text without marks, and the parts in them."""
    text = golden.replace("⟦", "").replace("⟧", "")
    return text, [part.split("⟧")[0] for part in golden.split("⟦")[1:]]


CHATS = [name for name in names() if name != "polar"]
"""Without the template of two answers side by side, which test_polar.py has."""


def target_parts(tokenizer, sample) -> list[str]:
    """The runs of target tokens, decoded."""
    tokens, weights = sample
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights > 0, [0]])))
    return [tokenizer.decode(tokens[begin:end]) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def test_every_shipped_template_has_a_golden():
    assert sorted(GOLDEN) == CHATS


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_text_ids_and_targets(name, tokenizer):
    text, parts = unmark(GOLDEN[name])
    rendered = Template(name, tokenizer).render(CONVERSATION)
    assert rendered.text == text
    assert [rendered.text[begin:end] for begin, end, _ in rendered.spans] == parts
    (sample,) = tokenize([rendered], tokenizer)
    assert sample[0].tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert target_parts(tokenizer, sample) == parts
    assert sample[0].tolist().count(tokenizer.bos_token_id) == (name != "qwen")
    assert sample[1][0] == 0


@pytest.mark.parametrize("name", GOLDEN_TOOLS)
def test_golden_tools(name, tokenizer):
    text, parts = unmark(GOLDEN_TOOLS[name])
    rendered = Template(name, tokenizer).render(WITH_TOOLS)
    assert rendered.text == text
    (sample,) = tokenize([rendered], tokenizer)
    assert target_parts(tokenizer, sample) == parts


def test_internlm2_renders_names_and_environment_which_the_published_template_loses(tokenizer):
    turns = (
        Turn("system", "Help."),
        Turn("system", "[]", name="<|plugin|>"),
        Turn("user", "[{}]", name="file"),
        Turn("assistant", "<|action_start|><|interpreter|>\n1<|action_end|>"),
        Turn("environment", "1", name="<|interpreter|>"),
        Turn("environment", "free"),
        Turn("assistant", "One."),
    )
    rendered = Template("internlm2", tokenizer).render(Conversation(turns))
    text, parts = unmark(
        "<s><|im_start|>system\nHelp.<|im_end|>\n<|im_start|>system name=<|plugin|>\n[]<|im_end|>\n"
        "<|im_start|>user name=file\n[{}]<|im_end|>\n<|im_start|>assistant\n"
        "⟦<|action_start|><|interpreter|>\n1<|action_end|><|im_end|>⟧\n"
        "<|im_start|>environment name=<|interpreter|>\n1<|im_end|>\n<|im_start|>environment\nfree<|im_end|>\n"
        "<|im_start|>assistant\n⟦One.<|im_end|>⟧\n"
    )
    assert rendered.text == text
    assert target_parts(tokenizer, tokenize([rendered], tokenizer)[0]) == parts


def test_alpaca_is_stanfords_prompt_with_and_without_input(tokenizer):
    template = Template("alpaca", tokenizer)
    plain = Conversation((Turn("user", "Name a prime."), Turn("assistant", "7")))
    assert template.render(plain).text == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName a prime.\n\n### Response:\n7</s>"
    )
    given = Conversation((Turn("user", "Translate.\n你好", input="你好"), Turn("assistant", "Hello")))
    assert template.render(given).text == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\n"
        "### Input:\n你好\n\n### Response:\nHello</s>"
    )


def random_conversations(count: int, system: bool = True, seed: int = 0) -> list[Conversation]:
    """Alternating turns with line ends, spaces at the edges, Chinese, emoji and markup in them."""
    generator = random.Random(seed)
    bits = [
        "word",
        " two  spaces",
        "\n",
        "\n\n",
        "  ",
        CHINESE[:7],
        "🙂",
        "def f():\n\treturn 1",
        "<b>&amp;</b>",
        "é",
        "1.5",
        "{{ x }}",
    ]

    def text() -> str:
        return "x" + "".join(generator.choice(bits) for _ in range(generator.randint(0, 8)))

    conversations = []
    for number in range(count):
        turns = [Turn("system", text())] if system and generator.random() < 0.5 else []
        for _ in range(generator.randint(1, 4)):
            turns += [Turn("user", text()), Turn("assistant", generator.choice(["", " ", "\n"]) + text())]
        conversations.append(Conversation(tuple(turns), origin=f"random:{number}"))
    return conversations


@pytest.mark.parametrize("name", CHATS)
def test_the_whole_equals_its_parts(name, tokenizer):
    """The prompt of every answer is what stands before it in the whole: as text, and as ids where a special
    token closes the prompt."""
    template = Template(name, tokenizer)
    for conversation in random_conversations(60):
        rendered = template.render(conversation)
        (sample,) = tokenize([rendered], tokenizer)
        answers = [index for index, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        assert len(rendered.spans) == len(answers)
        for index, (begin, end, _) in zip(answers, rendered.spans, strict=True):
            before = Conversation(conversation.turns[:index], origin="part")
            prompt = template.prompt_text(before)
            assert rendered.text.startswith(prompt)
            assert len(prompt) == begin
            through = template.render(Conversation(conversation.turns[: index + 1], origin="part"))
            assert through.text == rendered.text[: len(through.text)]
            assert through.text[begin:end] == rendered.text[begin:end]
            if name == "mistral":
                ids = template.render_prompt(before)
                assert sample[0][: len(ids)].tolist() == ids
                assert sample[1][len(ids)] == 1
                assert sample[1][len(ids) - 1] == 0


@pytest.mark.parametrize("name", CHATS)
def test_masks_equal_those_of_transformers_on_the_same_template(name, tokenizer):
    """Where no token straddles an edge the two rules agree; where one does (an answer that begins with a
    line end behind the header's), the straddling token is not the model's to predict and is not a target."""
    template = Template(name, tokenizer)
    straddled = 0
    for conversation in random_conversations(60, seed=1):
        messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        out = tokenizer.apply_chat_template(
            messages,
            chat_template=template.source,
            text_bos="<s>",
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        (sample,) = tokenize([template.render(conversation)], tokenizer)
        assert sample[0].tolist() == out["input_ids"]
        ours, theirs = sample[1] > 0, np.array(out["assistant_masks"]) > 0
        assert not (ours & ~theirs).any()
        for token in sample[0][theirs & ~ours]:
            straddled += 1
            assert tokenizer.decode([token]).startswith("\n")  # of the header; the rest is the answer's
    trims = name in ("llama3", "gemma", "mistral")
    assert not (trims and straddled)


def published(name: str) -> str:
    """A template as published with its models; TRL ships them (Apache-2.0)."""
    return files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("ours", "theirs", "system"),
    [
        ("llama3", "llama3", True),
        ("qwen", "qwen3_instruct_2507", True),
        ("gemma", "gemma", False),
        ("gemma", "gemma3", True),
    ],
)
def test_equals_the_published_template(ours, theirs, system, tokenizer):
    template = Template(ours, tokenizer)
    for conversation in random_conversations(40, system=system, seed=2):
        messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        for cut, header in ((len(messages), False), (len(messages) - 1, True)):
            expected = tokenizer.apply_chat_template(
                messages[:cut], chat_template=published(theirs), tokenize=False, add_generation_prompt=header
            )
            part = Conversation(conversation.turns[:cut])
            assert (template.prompt_text(part) if header else template.render(part).text) == expected


def test_qwen_tools_equal_the_published_template(tokenizer):
    template = Template("qwen", tokenizer)
    two = (ToolCall("weather", {"city": "上海"}), ToolCall("weather", {"city": "北京"}))
    turns = (
        Turn("system", "Be brief."),
        Turn("user", "天气？"),
        Turn("assistant", "Let me look.", tool_calls=two),
        Turn("tool", '{"t": 22}'),
        Turn("tool", '{"t": 3}'),
        Turn("assistant", "22, 3"),
    )
    for conversation in (Conversation(turns, (TOOL,)), Conversation(turns[1:], (TOOL,)), WITH_TOOLS):
        messages = [
            {"role": turn.role, "content": turn.content}
            | (
                {
                    "tool_calls": [
                        {"function": {"name": c.name, "arguments": c.arguments}} for c in turn.tool_calls
                    ]
                }
                if turn.tool_calls
                else {}
            )
            for turn in conversation.turns
        ]
        expected = tokenizer.apply_chat_template(
            messages, tools=[TOOL], chat_template=published("qwen3_instruct_2507"), tokenize=False
        )
        rendered = template.render(conversation)
        assert rendered.text == expected
        assert all(rendered.text[:end].endswith("<|im_end|>") for _, end, _ in rendered.spans)


def test_equals_the_published_lines_of_chatml_internlm2_and_mistral(tokenizer):
    """These three published templates are a line of code each on plain turns; here as that line in Python."""

    def chatml(messages, bos):
        return bos + "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in messages)

    def mistral(messages, bos):
        parts = (
            f"[INST] {turn.content}[/INST]" if turn.role == "user" else f" {turn.content.strip()}</s>"
            for turn in messages
        )
        return bos + "".join(parts)

    expected = {"chatml": chatml, "internlm2": chatml, "mistral": mistral}
    for name, render in expected.items():
        template = Template(name, tokenizer)
        for conversation in random_conversations(30, system=name != "mistral", seed=3):
            assert template.render(conversation).text == render(conversation.turns, "<s>")


def test_the_tokenizers_own_template_gives_the_same_spans_by_prefixes(tokenizer):
    """Llama 3's published template has no marks; its spans must be those of ours, which has."""
    own = make_tokenizer()
    own.chat_template = published("llama3")
    by_prefix, by_marks = Template("tokenizer", own), Template("llama3", tokenizer)
    for conversation in random_conversations(40, seed=4):
        for learn in ("assistant", "last", "all"):
            left, right = by_prefix.render(conversation, learn), by_marks.render(conversation, learn)
            assert (left.text, left.spans) == (right.text, right.spans)


def test_a_template_that_is_not_prefix_stable_is_refused_with_the_row(tokenizer):
    """Qwen3's published template takes the thinking out of earlier turns."""
    own = make_tokenizer()
    own.chat_template = published("qwen3")
    template = Template("tokenizer", own)
    assert template.render(Conversation((HI, HELLO))).text.endswith(
        "<think>\n\n</think>\n\nHello<|im_end|>\n"
    )
    with pytest.raises(
        UserError, match=r"x\.jsonl:1: template 'tokenizer' is not prefix-stable.*use one of alpaca"
    ):
        template.render(CONVERSATION)


def weights_by_text(name, tokenizer, turns, learn="assistant", weight=1.0) -> list[tuple[str, float]]:
    rendered = Template(name, tokenizer).render(Conversation(turns, weight=weight), learn)
    (tokens, weights) = tokenize([rendered], tokenizer)[0]
    edges = [0, *(np.flatnonzero(np.diff(weights)) + 1), len(weights)]
    runs = [(tokenizer.decode(tokens[a:b]), float(weights[a])) for a, b in itertools.pairwise(edges)]
    return [(text, weight) for text, weight in runs if weight]


def test_learn_last_and_per_turn_switches_and_weights(tokenizer):
    turns = (HI, HELLO, BYE, SEE_YOU)
    assert weights_by_text("chatml", tokenizer, turns, "last") == [("See you<|im_end|>", 1.0)]
    off = (HI, Turn("assistant", "Hello", learn=False), BYE, SEE_YOU)
    assert weights_by_text("chatml", tokenizer, off) == [("See you<|im_end|>", 1.0)]
    on = (HI, Turn("assistant", "Hello", learn=True), BYE, Turn("assistant", "See you", learn=False))
    assert weights_by_text("chatml", tokenizer, on, "last") == [("Hello<|im_end|>", 1.0)]
    weighed = (HI, Turn("assistant", "Hello", weight=0.25), BYE, Turn("assistant", "See you", weight=0))
    assert weights_by_text("chatml", tokenizer, weighed, weight=2.0) == [("Hello<|im_end|>", 0.5)]


@pytest.mark.parametrize("name", ["chatml", "internlm2", "llama3", "qwen"])
def test_the_loss_may_be_taken_on_a_user_turn(name, tokenizer):
    turns = (SYSTEM, Turn("user", "Hi there", learn=True, weight=0.5), HELLO)
    end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    assert weights_by_text(name, tokenizer, turns) == [(f"Hi there{end}", 0.5), (f"Hello{end}", 1.0)]


def test_learn_all_but_what_is_switched_off(tokenizer):
    turns = (Turn("user", "Hi"), HELLO, Turn("user", "Secret", learn=False), SEE_YOU)
    (first, _), (second, _) = weights_by_text("internlm2", tokenizer, turns, "all")
    assert first == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert second == "<|im_start|>assistant\nSee you<|im_end|>\n"


def test_slow_tokenizers_give_the_same_or_say_why_not(tokenizer):
    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    for conversation in random_conversations(10, seed=5):
        rendered = Template("llama3", tokenizer).render(conversation)
        (fast,), (slow,) = tokenize([rendered], tokenizer), tokenize([rendered], Slow())
        assert np.array_equal(fast[0], slow[0])
        assert np.array_equal(fast[1], slow[1])


def test_special_tokens_that_the_tokenizer_splits_are_named(bare_tokenizer):
    with pytest.raises(
        UserError, match=r"template 'internlm2' needs <\|im_start\|>, <\|im_end\|>, which this tokenizer"
    ):
        Template("internlm2", bare_tokenizer)
    Template("alpaca", bare_tokenizer)  # needs none


def test_tokens_for_tools_are_asked_for_only_by_rows_with_tools():
    plain = make_tokenizer(special=("<|im_start|>", "<|im_end|>"))
    template = Template("internlm2", plain)
    template.render(CONVERSATION)
    with pytest.raises(UserError, match=r"needs <\|plugin\|>, <\|interpreter\|>"):
        template.render(WITH_TOOLS)


def test_bos_goes_before_chatml_only_where_the_tokenizer_itself_puts_it():
    silent = make_tokenizer(adds_bos=False)
    assert Template("chatml", silent).render(CONVERSATION).text.startswith("<|im_start|>")
    assert Template("internlm2", silent).render(CONVERSATION).text.startswith("<s><|im_start|>")


@pytest.mark.parametrize(
    ("name", "conversation", "message"),
    [
        (
            "gemma",
            Conversation((HI, BYE, HELLO), origin="a:1"),
            "a:1: template 'gemma' cannot render.*alternate",
        ),
        ("mistral", Conversation((HELLO,), origin="a:1"), "alternate"),
        ("chatml", WITH_TOOLS, "x.jsonl:2: template 'chatml'.*no place for tools; use internlm2"),
        ("alpaca", WITH_TOOLS, "no place for tools"),
        ("nonsense", CONVERSATION, "template 'nonsense': no such template.*alpaca, chatml"),
        ("missing.jinja", CONVERSATION, "no such template"),
        ("tokenizer", CONVERSATION, "no chat template; set data.template"),
    ],
)
def test_refusals_say_where_what_and_what_to_do(name, conversation, message, tokenizer):
    with pytest.raises(UserError, match=message):
        Template(name, tokenizer).render(conversation)


def test_a_template_file_of_the_users(tmp_path, tokenizer):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}")
    rendered = Template(str(file), tokenizer).render(Conversation((HI, HELLO)))
    assert [rendered.text[begin:end] for begin, end, _ in rendered.spans] == ["assistant: Hello</s>"]
    file.write_text("{% for m in messages %}")
    with pytest.raises(UserError, match="line 1"):
        Template(str(file), tokenizer)


@pytest.mark.parametrize("name", sorted(names()))
def test_shipped_templates_end_an_answer(name, tokenizer):
    Template(name, tokenizer).check_answers_end()


def test_a_template_without_an_end_teaches_no_stopping(tmp_path, tokenizer):
    file = tmp_path / "endless.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(UserError, match="so a model would never learn to stop"):
        Template(str(file), tokenizer).check_answers_end()


def test_rows_cannot_reach_python_through_a_template(tmp_path, tokenizer):
    file = tmp_path / "evil.jinja"
    file.write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(UserError, match="unsafe"):
        Template(str(file), tokenizer).render(Conversation((HI, HELLO)))
    file.write_text("{% generation %}{{ messages[1].content }}{% endgeneration %}")
    row = Conversation((HI, Turn("assistant", json.dumps("{{ 7*7 }} {% generation %}"))))
    assert "{{ 7*7 }} {% generation %}" in Template(str(file), tokenizer).render(row).text


LOOP = "{% for i in range(99999) %}"
MISCHIEF = {
    "zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "a zero known when it is compiled": ("{{ 1 // 0 }}{{ 2 ** -1 % 0 }}", "ZeroDivisionError"),
    "calls without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "loops in loops": (LOOP * 3 + "{% endfor %}" * 3, "more than 200,000 items"),
    "loops in a block and a macro": (
        "{% macro f() %}{% for i in range(99999) %}{% endfor %}{% endmacro %}"
        + LOOP
        + "{{ f() }}{% endfor %}",
        "more than 200,000 items",
    ),
    "one long loop": ("{% for i in range(10 ** 9) %}x{% endfor %}", "[Rr]ange"),
    "a wide text": ("{{ messages[0].content * (10 ** 11) }}", "more than 1,000,000"),
    "a wide constant": ("{{ 'a' * (10 ** 11) }}", "more than 1,000,000|MemoryError"),
    "a power of powers": ("{{ (7 + messages | length) ** (10 ** 9) }}", "more than 1,000,000"),
    "a name that is not there": ("{{ messages[0].nothing.more }}", "nothing"),
    "a type": ("{{ messages[0].content + 1 }}", "TypeError"),
}


@pytest.fixture
def _few_items(monkeypatch):
    """Loops end after 0.1 s in place of 10; the test of one that escapes the bound does not end."""
    monkeypatch.setattr(sandbox, "MOST_ITEMS", 200_000)


@pytest.mark.usefixtures("_few_items")
@pytest.mark.parametrize("kind", MISCHIEF)
def test_a_template_can_neither_hang_nor_crash_a_run(kind, tmp_path, tokenizer):
    source, message = MISCHIEF[kind]
    file = tmp_path / "bad.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}" + source)
    with pytest.raises(UserError, match=message) as refused:
        Template(str(file), tokenizer).render(CONVERSATION)
    assert "bad.jinja" in str(refused.value)


@pytest.mark.usefixtures("_few_items")
def test_loops_are_counted_anew_for_each_conversation(tmp_path, tokenizer):
    file = tmp_path / "slow.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}" + LOOP + "{% endfor %}")
    template = Template(str(file), tokenizer)
    for _ in range(3):  # in all more items than one rendering may have
        template.render(Conversation((HI, HELLO)))


def test_products_of_ordinary_size_are_products(tmp_path, tokenizer):
    file = tmp_path / "rule.jinja"
    file.write_text("{% for m in messages %}{{ '-' * 3 }}{{ 2 ** 3 * 2 }}{{ m.content }}</s>{% endfor %}")
    assert (
        Template(str(file), tokenizer).render(Conversation((HI, HELLO))).text == "---16Hi</s>---16Hello</s>"
    )
