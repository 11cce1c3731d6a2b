"""Prompts end to end: their tokens, what is skipped and counted, conditions, parts, and the fingerprint."""

import json

import numpy as np
import pytest

from tests.unit.data.conftest import make_tokenizer
from tuner.config.data import Chat, Preferences, Prompts, Source, Split
from tuner.data import token_cache as cache
from tuner.data.conditions import Conditions, Wordings
from tuner.data.conversation import Conversation, ToolCall, Turn
from tuner.data.load_examples import load_examples
from tuner.data.load_preferences import load_preferences
from tuner.data.load_prompts import RewardReader, load_prompts
from tuner.data.prompts import PromptSet
from tuner.data.sources import Rows
from tuner.data.template import Template
from tuner.errors import UserError

CHINESE = "请给我介绍五个上海的景点"
PLAIN = {"messages": [{"role": "user", "content": "Q"}]}


@pytest.fixture
def load(write, tokenizer):
    """load([row, ...], conditions=..., system=...) -> Dataset; the rows stand in rows.jsonl."""

    def loaded(rows, conditions=None, **fields):
        files = {"files": (write("rows.jsonl", *rows),)} | fields
        reader = (
            None if conditions is None else RewardReader(tuple(conditions), Template("internlm2", tokenizer))
        )
        return load_prompts(Prompts(**{"template": "internlm2", **files}), tokenizer, reader)

    return loaded


def texts(prompts: PromptSet, tokenizer) -> list[str]:
    return [tokenizer.decode(prompts.tokens(index)) for index in range(len(prompts))]


def test_tokens_end_with_the_header_of_the_answer(load, tokenizer):
    rows = [{"prompt": CHINESE}, {"prompt": [{"role": "user", "content": "Two?"}]}]
    train = load(rows).train
    assert texts(train, tokenizer) == [
        f"<s><|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        for question in (CHINESE, "Two?")
    ]
    template = Template("internlm2", tokenizer)
    for index, question in enumerate((CHINESE, "Two?")):
        whole = template.render_prompt(Conversation((Turn("user", question),)))
        assert train.tokens(index).tolist() == whole
        assert train.tokens(index).dtype == np.int32
    assert train.lengths.tolist() == [len(train.tokens(0)), len(train.tokens(1))]


@pytest.mark.parametrize("template", ["internlm2", "chatml", "llama3", "qwen"])
def test_they_are_the_tokens_that_sft_learns_answers_behind(load, write, tokenizer, template):
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "好。"}]}
        for question in (CHINESE, "Two? ")
    ]
    samples = load_examples(Chat(files=(write("chat.jsonl", *rows),), template=template), tokenizer).train
    prompts = load(rows, template=template).train
    for index in range(2):
        assert prompts.tokens(index).tolist() == samples.prompt(index).tolist()
        assert prompts.prompt(index).reference == "好。"


def test_all_of_a_row_comes_back(load, write, tokenizer, tmp_path):
    call = {"id": "1", "function": {"name": "weather", "arguments": {"city": "罗马"}}}
    row = {
        "messages": [
            {"role": "user", "content": "How warm?", "name": "ann"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "31", "tool_call_id": "1"},
            {"role": "assistant", "content": "三十一度。"},
        ],
        "tools": [{"name": "weather"}],
        "condition": "brief",
        "gold": {"degrees": 31.5, "words": ["warm", None]},
    }
    for _ in range(2):  # made, and from the cache
        prompt = load([row, PLAIN], ["brief", "kind"]).train.prompt(0)
        assert prompt.turns == (
            Turn("user", "How warm?", "ann"),
            Turn("assistant", "", tool_calls=(ToolCall("weather", {"city": "罗马"}, "1"),)),
            Turn("tool", "31", call_id="1"),
        )
        assert prompt.tools == ({"type": "function", "function": {"name": "weather"}},)
        assert prompt.reference == "三十一度。"
        assert prompt.condition == "brief"
        assert prompt.values == row
        assert prompt.origin == str(tmp_path / "rows.jsonl:1")
    second = load([row, PLAIN]).train.prompt(1)
    assert second.values == {**PLAIN, "condition": None}
    assert second.origin.endswith("rows.jsonl:2")


def test_values_that_json_has_not_are_kept_as_texts(write, tokenizer, tmp_path):
    import datetime

    import datasets

    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([{"prompt": "Q", "when": datetime.date(2026, 3, 1)}]).to_parquet(path)
    prompt = load_prompts(Prompts(files=(path,), template="chatml"), tokenizer, None).train.prompt(0)
    assert prompt.values == {"prompt": "Q", "when": "2026-03-01", "condition": None}


def test_long_prompts_are_skipped_and_counted(load, tokenizer):
    rows = [{"prompt": "word " * count} for count in (1, 400, 2, 300)]
    fits = len(load([rows[0], rows[2]]).train.tokens(1))
    data = load(rows, max_length=fits)
    assert data.train.origin(1).endswith(":3")
    assert data.train.lengths.max() == fits
    [counts] = data.report.sources
    assert (counts.rows, counts.kept, counts.too_long, counts.dropped_too_long) == (4, 2, 2, 2)
    assert counts.longest > 300
    assert "2 too long and dropped" in str(data.report)
    assert len(load(rows, max_length=fits - 1).train) == 1
    with pytest.raises(UserError, match=r"no row is left .*4 too long and dropped"):
        load(rows, max_length=2)


def test_the_report_counts_prompts_by_condition(load):
    rows = [{"prompt": str(n), "condition": name} for n, name in enumerate(("kind", "kind", "brief", None))]
    data = load([*rows, rows[0], {"prompt": "off", "weight": 0}], ["brief", "kind", "honest"])
    assert data.report.parts["train"].conditions == {"kind": 3, "brief": 1, "": 1}
    assert data.report.parts["train"].prompts == 5
    report = str(data.report)
    assert "train: 5 prompts (3 kind, 1 brief, 1 without a condition), " in report
    assert "1 equal to an earlier one and kept, 1 switched off" in report
    assert data.report.notes == [
        "1 prompts have no condition, and the reward model was trained with some: its scores of answers to them mean "
        "little; name one in the row or its Source",
        "No prompt is of condition 'honest'",
    ]
    assert "in the loss" not in report
    assert load(rows).report.notes == []  # of no reward model that is known
    assert len(load([rows[0], rows[0]], duplicates="drop").train) == 1


def test_equal_prompts_of_other_conditions_or_systems_are_no_duplicates(write, load, tokenizer):
    same = {"prompt": "Q", "reference": "A"}
    data = load([same, {**same, "condition": "kind"}, {**same, "reference": "B"}], duplicates="drop")
    assert [data.train.condition(index) for index in range(len(data.train))] == [None, "kind"]
    path = write("same.jsonl", same)
    files = (path, Source(path=path, system="Be kind."))
    assert len(load([same], files=files, duplicates="drop").train) == 2


def test_weights_of_rows_are_told_to_be_without_effect(load):
    data = load([{"prompt": "a", "weight": 2.0}, {"prompt": "b"}])
    assert "1 rows have a weight, and prompts are not weighted" in str(data.report)


def test_the_policys_system_turn_is_the_rows_the_sources_or_the_configs(load, write, tokenizer):
    rows = [{"prompt": "Q"}, {"prompt": "Q", "system": "Row's."}]
    files = (write("a.jsonl", *rows), Source(path=write("b.jsonl", *rows), system="源的。"))
    train = load([], files=files, system="Config's.").train
    system = [text.split("system\n")[1].split("<|im_end|>")[0] for text in texts(train, tokenizer)]
    assert system == ["Config's.", "Row's.", "源的。", "Row's."]
    assert all("system" not in text for text in texts(load(rows[:1]).train, tokenizer))
    assert train.prompt(0).turns == (Turn("user", "Q"),)
    assert train.prompt(2).system == "源的。"
    assert train.tokens(2).tolist() == Template("internlm2", tokenizer).render_prompt(
        train.prompt(2).policy_input()
    )


def test_a_prompt_that_the_reward_model_cannot_be_asked_about_is_refused_at_once(write, tokenizer):
    rows = [
        PLAIN,
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}] * 2},
    ]
    tool = {"messages": [*rows[1]["messages"], {"role": "tool", "content": "3"}, *PLAIN["messages"]]}
    alpaca, prompts = (
        Template("alpaca", tokenizer),
        Prompts(files=(write("rows.jsonl", PLAIN, tool),), template="chatml"),
    )
    assert len(load_prompts(prompts, tokenizer, None).train) == 2
    with pytest.raises(
        UserError, match=r"rows\.jsonl:2: template 'alpaca' cannot render .* leave the row out"
    ):
        load_prompts(prompts, tokenizer, RewardReader((), alpaca))


def test_conditions_come_from_rows_and_sources_and_are_known(load, write):
    path = write("a.jsonl", {"prompt": "a"}, {"prompt": "b", "condition": "brief"})
    data = load([], ["brief", "kind"], files=(Source(path=path, condition="kind"),))
    assert [data.train.condition(index) for index in (0, 1)] == ["kind", "brief"]
    assert data.train.prompt(0).values == {"prompt": "a", "condition": "kind"}
    for known, available in ((["brief"], "has: brief"), ([], "has: none")):
        with pytest.raises(
            UserError, match=rf"a\.jsonl:1: condition 'kind' is unknown .*{available}; correct it"
        ):
            load([], known, files=(Source(path=path, condition="kind"),))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: condition 'curt' is unknown"):
        load([{"prompt": "a"}, {"prompt": "b", "condition": "curt"}], ["brief"])
    assert load([{"prompt": "b", "condition": "curt"}], None).train.condition(0) == "curt"


def test_a_cached_entry_is_no_way_around_the_check(load):
    rows = [{"prompt": "b", "condition": "curt"}]
    load(rows, None)
    with pytest.raises(UserError, match="'curt' is unknown"):
        load(rows, ["brief"])


def test_functions_make_rows_and_change_no_values(write, load, tmp_path):
    (tmp_path / "shapes.py").write_text(
        "def ask(row):\n"
        "    row['words'].append('!')\n"
        "    return {'prompt': ' '.join(row.pop('words')), 'reference': 'ok', 'condition': 'kind', 'system': 'S'}\n"
        "def fail(row):\n    return row['nothing']\n"
        "def text(row):\n    return {'text': 'raw'}\n"
    )
    path = write("a.jsonl", {"words": ["你好", "world"]})

    def source(name):
        return (Source(path=path, shape=f"{tmp_path}/shapes.py:{name}"),)

    prompt = load([], ["kind"], files=source("ask")).train.prompt(0)
    assert prompt.turns == (Turn("system", "S"), Turn("user", "你好 world !"))
    assert (prompt.reference, prompt.condition) == ("ok", "kind")
    assert prompt.values == {"words": ["你好", "world"], "condition": "kind"}
    with pytest.raises(UserError, match=r"a\.jsonl:1: fail failed: KeyError"):
        load([], files=source("fail"))
    with pytest.raises(UserError, match=r"a\.jsonl:1: this row's shape is unknown \(keys: text\)"):
        load([], files=source("text"))


def test_bad_rows_are_named(load):
    with pytest.raises(
        UserError, match=r"rows\.jsonl:2: not a prompt row .*recognized from the source's first"
    ):
        load([{"prompt": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: this row's shape is unknown"):
        load([{"text": "b"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: no user turn with a text to answer"):
        load([{"prompt": "a"}, {"prompt": ""}])


def test_equal_prompts_never_cross_and_fall_where_the_reward_models_rows_fall(load, write, tokenizer):
    numbers = range(300)
    rows = [
        {"prompt": f"What is {n}?", "condition": ("kind", "brief")[side]} for n in numbers for side in (0, 1)
    ]
    data = load([*rows, *rows], split=Split(test=0.3))
    assert data.test is not None
    assert 120 < len(data.test) < 240 * 2
    turns = [{part.prompt(index).turns for index in range(len(part))} for part in (data.train, data.test)]
    assert not turns[0] & turns[1]
    assert len(data.train) + len(data.test) == 4 * len(numbers)
    pairs = [{**row, "chosen": "good", "rejected": "bad"} for row in rows[::2]]
    preferences = Preferences(files=(write("p.jsonl", *pairs),), template="internlm2", split=Split(test=0.3))
    known = Conditions({"kind": Wordings(("Be kind.",)), "brief": Wordings(("Be brief.",))})
    held_out = load_preferences(preferences, tokenizer, known, None).test
    assert held_out is not None
    lines = {int(held_out.origin(row).rpartition(":")[2]) - 1 for row in range(len(held_out))}
    assert {(Turn("user", f"What is {n}?"),) for n in lines} == turns[1]


def test_test_files_are_the_test_part(load, write):
    data = load([{"prompt": "a"}], test_files=(write("t.jsonl", {"prompt": "b"}, {"prompt": "a"}),))
    assert data.test is not None
    assert data.validation is None
    assert [data.test.prompt(index).turns[0].content for index in (0, 1)] == ["b", "a"]
    assert "1 rows of validation_files or test_files are trained on as well" in str(data.report)
    assert "test: 2 prompts" in str(data.report)


def test_sources_are_numbered(load, write):
    files = tuple(write(f"{name}.jsonl", {"prompt": name}, {"prompt": name * 2}) for name in "ab")
    assert load([], files=files).train.sources.tolist() == [0, 0, 1, 1]


ROWS = [{"prompt": "one two"}, {"prompt": CHINESE, "condition": "kind", "gold": 1}]
CHANGES = {
    "rows": ([{"prompt": "one three"}, ROWS[1]], {}),
    "order": (ROWS[::-1], {}),
    "values": ([ROWS[0], {**ROWS[1], "gold": 2}], {}),
    "reference": ([ROWS[0], {**ROWS[1], "reference": "x"}], {}),
    "condition": ([ROWS[0], {**ROWS[1], "condition": "brief"}], {}),
    "template": (ROWS, {"template": "llama3"}),
    "system": (ROWS, {"system": "Be kind."}),
    "max_length": (ROWS, {"max_length": 24}),
    "drop": ([{**ROWS[0], "image": "a.png"}, ROWS[1]], {"drop": ("images",)}),
    "split": ([{"prompt": str(n)} for n in range(9)], {"split": Split(test=0.5)}),
    "duplicates": ([*ROWS, ROWS[0]], {"duplicates": "drop"}),
    "limit": (ROWS, {"limit": 1}),
    "spelled_tokens": ([{"prompt": "one </s>"}], {"spelled_tokens": {"</s>": "token"}}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_is_of_what_is_asked(load, change):
    rows, fields = CHANGES[change]
    plain = load(ROWS).fingerprint
    assert load(ROWS).fingerprint == plain
    if change in ("split", "duplicates", "spelled_tokens"):
        plain = load(rows).fingerprint
    assert load(rows, **fields).fingerprint != plain


def test_every_field_of_the_config_is_seen_or_known_to_be_without_effect():
    without = {"kind", "files", "validation_files", "test_files", "cache"}
    others = {"rows", "order", "values", "reference", "condition"}
    assert set(Prompts.model_fields) == (CHANGES.keys() - others) | without


def test_the_key_of_the_cache_and_the_fingerprint_follow_tokenizer_and_sources(load, write, tokenizer):
    path = write("a.jsonl", *ROWS)

    def key(source, **fields):
        data = Prompts(files=(source,), template="internlm2", **fields)
        return cache.cache_key(data, tokenizer, [Rows(source) for source in data.sources])

    plain = key(path)
    assert key(Source(path=path, share=2.0)) == plain
    assert key(Source(path=path, system="S")) != plain
    assert key(Source(path=path, condition="kind")) != plain
    assert key(path, system="S") != plain
    other = make_tokenizer(vocab_size=650)
    data = Prompts(files=(path,), template="internlm2")
    assert load_prompts(data, other, None).fingerprint != load_prompts(data, tokenizer, None).fingerprint


def test_a_second_load_is_memory_mapped_and_equal(load, monkeypatch):
    first = load(ROWS, ["kind"])
    monkeypatch.setattr("tuner.data.dataset.Builder.add_source", None)  # nothing may be built again
    second = load(ROWS, ["kind"])
    assert isinstance(second.train.rows_B, np.memmap)
    assert second.fingerprint == first.fingerprint == second.train.fingerprint()
    assert second.report == first.report
    assert [second.train.prompt(index) for index in (0, 1)] == [first.train.prompt(index) for index in (0, 1)]
    json.dumps(second.report.to_dict())


def test_some_prompts_in_another_order(load):
    train = load([*ROWS, {"prompt": "last", "condition": "brief"}]).train
    taken = train.take([2, 0, 2])
    assert [taken.prompt(place) for place in range(3)] == [train.prompt(index) for index in (2, 0, 2)]
    assert [taken.tokens(place).tolist() for place in range(3)] == [
        train.tokens(i).tolist() for i in (2, 0, 2)
    ]
    assert len(train.take([])) == 0
