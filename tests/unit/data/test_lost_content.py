"""Nothing that a row says is lost on the way to its text, or the row is refused or dropped by choice."""

from importlib.resources import files

import pytest

from tests.unit.data.conftest import chat, make_tokenizer
from tests.unit.data.test_template import TOOL, target_parts
from tuner.config.data import Chat, Preferences, Prompts, Replay
from tuner.data.conditions import Conditions
from tuner.data.conversation import Conversation, ToolCall, Turn
from tuner.data.load_examples import load_examples
from tuner.data.load_preferences import load_preferences
from tuner.data.load_prompts import load_prompts
from tuner.data.template import Template
from tuner.errors import UserError

PLAIN = (
    "{%- for turn in messages -%}<{{ turn.role }}>{{ turn.content }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)
CUTS = PLAIN.replace("turn.content", "turn.content.split('</think>')[-1]")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 3}}}
CALLS = {
    "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
}
THOUGHT = "<think>\ntwo and three\n</think>\n\n5."


def published(name: str) -> str:
    """A template as its publisher has it; TRL ships them."""
    return files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture
def own(tokenizer):
    """own(source) -> a tokenizer with this chat template."""

    def with_template(source: str):
        result = make_tokenizer()
        result.chat_template = source
        return result

    return with_template


LOST = {
    "tools": (PLAIN, {**chat("a", "b"), "tools": [TOOL]}, r"the tools of this conversation \(weather\)"),
    "calls": (PLAIN, CALLS, "calls weather, and template 'tokenizer' does not write the whole call"),
    "reasoning": (CUTS, chat("2 + 3?", THOUGHT), "leaves the reasoning before </think> out"),
    "text": (
        PLAIN.replace("turn.content }}", "turn.content if turn.role != 'system' }}"),
        {"messages": [{"role": "system", "content": "Be brief."}, *chat("a", "b")["messages"]]},
        r"turn 1 \(system\): .* does not write all of its text \('Be brief\.'\)",
    ),
    "images": (PLAIN, {**chat("a", "b"), "images": ["a.png"]}, 'the row has "images", and only texts'),
}


@pytest.mark.parametrize("content", LOST)
def test_it_is_refused_by_its_row_and_dropped_by_choice(content, write, own):
    template, row, message = LOST[content]
    path = write("a.jsonl", chat("Hi", "Hello"), row)
    with pytest.raises(UserError, match=rf'a\.jsonl:2: .*{message}.*data\.drop=\["{content}"\]'):
        load_examples(Chat(files=(path,)), own(template))
    data = load_examples(Chat(files=(path,), drop=content), own(template))
    assert len(data.train) == 1
    assert data.report.sources[0].lost == {content: 1}
    assert f"1 rows were dropped by data.drop: 1 for their {content}" in str(data.report)
    others = tuple(name for name in LOST if name != content)
    with pytest.raises(UserError, match=message):
        load_examples(Chat(files=(path,), drop=others), own(template))
    replay = Replay(files=(path,), template="tokenizer", drop=content)
    assert len(load_examples(replay.data, own(template)).train) == 1


def test_preferences_and_prompts_are_checked_too(write, own):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write("a.jsonl", pair, {**pair, "prompt": "d", "tools": [TOOL]})
    preferences = Preferences(files=(path,))
    with pytest.raises(UserError, match=r'a\.jsonl:2: .*the tools.*data\.drop=\["tools"\]'):
        load_preferences(preferences, own(PLAIN), Conditions({}), None)
    kept = preferences.model_copy(update={"drop": ("tools",)})
    assert len(load_preferences(kept, own(PLAIN), Conditions({}), None).train) == 1
    with pytest.raises(UserError, match=r'a\.jsonl:2: .*the tools.*prompts\.drop=\["tools"\]'):
        load_prompts(Prompts(files=(path,)), own(PLAIN), None)
    assert len(load_prompts(Prompts(files=(path,), drop=("tools",)), own(PLAIN), None).train) == 1


@pytest.mark.parametrize(
    "row",
    [
        {**chat("a", "b"), "image": "a.png"},
        {"messages": [{"role": "user", "content": "a", "videos": ["a.mp4"]}, chat("a", "b")["messages"][1]]},
        chat("<image>\nWhat is this?", "A cat."),
        {
            "conversations": [
                {"from": "human", "value": "What is this? <image>"},
                {"from": "gpt", "value": "A cat."},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, chat("a", "b")["messages"][1]]},
    ],
)
def test_rows_that_belong_to_pictures_are_no_texts(row, write, tokenizer):
    path = write("a.jsonl", row)
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*text.*data\.drop=\[\"images\"\]"):
        load_examples(Chat(files=(path,), template="chatml"), tokenizer)


def test_markup_and_empty_lists_are_no_pictures(write, tokenizer):
    rows = chat("Close <image> in <rss><image></image></rss>.", "<image>"), {**chat("a", "b"), "images": []}
    assert len(load_examples(Chat(files=(write("a.jsonl", *rows),), template="chatml"), tokenizer).train) == 2


@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_the_call_shape_before_tool_calls_is_a_call(content, write, tokenizer):
    old = {"role": "assistant", "content": content, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    answer = {"role": "function", "name": "f", "content": "r"}
    new = {"role": "assistant", "content": content, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    rows = [
        {"messages": [{"role": "user", "content": "q"}, call, answer, {"role": "assistant", "content": "z"}]}
        for call in (old, new)
    ]
    train = load_examples(Chat(files=(write("a.jsonl", *rows),), template="internlm2"), tokenizer).train
    assert train.example(0)[0].tolist() == train.example(1)[0].tolist()
    assert '{"name": "f", "parameters": {"x": 1}}<|action_end|>' in tokenizer.decode(train.example(0)[0])


def learned(data, index, tokenizer) -> list[str]:
    return target_parts(tokenizer, data.example(index))


def test_deepseek_r1_learns_the_thought_behind_the_header_that_opens_it(write, own):
    """Its template cuts the thought out of every turn it renders, and its header begins one."""
    tokenizer = own(published("deepseek_r1_distill"))
    rows = chat("2 + 3?", THOUGHT), chat("2 + 3?", "two and three\n</think>\n\n5.")
    train = load_examples(Chat(files=(write("a.jsonl", *rows),)), tokenizer).train
    for index in (0, 1):
        assert tokenizer.decode(train.example(index)[0]) == (
            "<s><｜User｜>2 + 3?<｜Assistant｜><think>\ntwo and three\n</think>\n\n5.<｜end▁of▁sentence｜>"
        )
        assert learned(train, index, tokenizer) == ["two and three\n</think>\n\n5.<｜end▁of▁sentence｜>"]
        # what is learned is what follows the prompt that it is generated from
        prompt = Template("tokenizer", tokenizer).render_prompt(Conversation((Turn("user", "2 + 3?"),)))
        assert train.prompt(index).tolist() == prompt
    with pytest.raises(
        UserError, match=r"b\.jsonl:1: turn 2 .*begins answers with <think>, and this one has no"
    ):
        load_examples(Chat(files=(write("b.jsonl", chat("2 + 3?", "5.")),)), tokenizer)


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3"])
def test_every_turn_is_learned_as_it_is_generated(name, write, own):
    tokenizer = own(published(name))
    second = "<think>\nit was 5\n</think>\n\n6."
    path = write("a.jsonl", chat("2 + 3?", THOUGHT, "And one more?", second))
    data = load_examples(Chat(files=(path,)), tokenizer)
    assert len(data.train) == 2
    assert "1 conversations became 2 samples, one for each learned turn" in str(data.report)
    template = Template("tokenizer", tokenizer)
    turns = (Turn("user", "2 + 3?"), Turn("assistant", THOUGHT), Turn("user", "And one more?"))
    for index, (before, content) in enumerate(((turns[:1], THOUGHT), (turns, second))):
        prompt = template.render_prompt(Conversation(before))
        assert data.train.prompt(index).tolist() == prompt
        (part,) = learned(data.train, index, tokenizer)
        assert part.startswith(content.removeprefix("<think>\n") if "r1" in name else content)
    assert "two and three" not in tokenizer.decode(data.train.prompt(1))
    last = load_examples(Chat(files=(path,), learn="last"), tokenizer)
    assert [last.train.example(0)[0].tolist()] == [data.train.example(1)[0].tolist()]
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*not prefix-stable"):
        load_examples(Chat(files=(path,), changed_turns="error"), tokenizer)


def test_marks_do_not_hide_that_earlier_thoughts_are_cut(write, own):
    source = CUTS.replace(
        "{{ turn.content.split('</think>')[-1] }}<|im_end|>",
        "{% if turn.role == 'assistant' %}{% generation %}"
        "{{ turn.content if loop.last else turn.content.split('</think>')[-1] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ turn.content }}<|im_end|>{% endif %}",
    )
    tokenizer = own(source)
    data = load_examples(
        Chat(files=(write("a.jsonl", chat("a", THOUGHT, "b", THOUGHT), chat("a", "b", "c", "d")),)), tokenizer
    )
    parts = [learned(data.train, index, tokenizer) for index in range(len(data.train))]
    assert parts == [[f"{THOUGHT}<|im_end|>"], [f"{THOUGHT}<|im_end|>"], ["b<|im_end|>", "d<|im_end|>"]]


def test_a_score_is_read_from_the_text_that_was_trained_on(own):
    """Also where the template would cut the thought, and where the answer broke off inside it."""
    template = Template("tokenizer", own(published("deepseek_r1_distill")))
    question = Turn("user", "2 + 3?", learn=False)
    trained = template.render(Conversation((question, Turn("assistant", THOUGHT))))
    for answer in (THOUGHT, THOUGHT.removeprefix("<think>\n")):
        scored = template.render(Conversation((question, Turn("assistant", answer, learn=False))))
        assert scored.text == trained.text
        assert not scored.spans
    broken = template.render(Conversation((question, Turn("assistant", "two and", learn=False))))
    assert broken.text.endswith("<think>\ntwo and<｜end▁of▁sentence｜>")


def test_calls_are_found_in_whatever_way_a_template_writes_them(own):
    """As JSON with escapes, and as XML with line breaks."""
    call = ToolCall("weather", {"city": 'São "Paulo"\n', "days": [1, 2.5], "now": True, "x": {"y": None}})
    conversation = Conversation((Turn("user", "?"), Turn("assistant", "", tool_calls=(call,))), (TOOL,))
    body = "{{ tools }}" + PLAIN
    for written in (
        "{{ turn.tool_calls[0].function.arguments | tojson(ensure_ascii=True, indent=4) }}",
        "{% for name, value in turn.tool_calls[0].function.arguments.items() %}"
        "<parameter={{ name }}>\n{{ value if value is string else value | tojson }}\n</parameter>{% endfor %}",
    ):
        source = body.replace(
            "{{ turn.content }}",
            "{{ turn.content }}{% if turn.tool_calls %}weather " + written + "{% endif %}",
        )
        Template("tokenizer", own(source)).render_row(conversation)
    short = source.replace(".items()", ".items() if name != 'days'")
    with pytest.raises(UserError, match="does not write the whole call"):
        Template("tokenizer", own(short)).render_row(conversation)


def test_a_template_that_leaves_out_what_tools_are_for_is_refused(own):
    source = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}" + PLAIN
    tool = {"type": "function", "function": {"name": "weather", "description": "Tells the weather."}}
    conversation = Conversation((Turn("user", "?"), Turn("assistant", "b")), (tool,))
    with pytest.raises(UserError, match="does not write the tools"):
        Template("tokenizer", own(source)).render_row(conversation)
    described = source.replace("tool.function.name", "tool.function.name + tool.function.description")
    Template("tokenizer", own(described)).render_row(conversation)
