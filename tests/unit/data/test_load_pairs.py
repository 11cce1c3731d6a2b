"""The pairs a policy learns from: their tokens are those of the whole conversation, and what is left out is counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuner.config import Model, Preferences
from tuner.data.conversation import Conversation, Turn
from tuner.data.conversation_rows import conversation_reader
from tuner.data.dataset import Dataset
from tuner.data.examples import tokenize
from tuner.data.load_labels import labeled_answers, load_labels
from tuner.data.load_pairs import answer_suffix, load_pairs, pairs
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.models.load import load_tokenizer

TOKENIZER: Any = load_tokenizer(Model(path="tuner:tiny"))
MELTING = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
"""A template without a border between prompt and answer: one token may hold the end of one and the beginning of the
other."""

Load = Callable[..., Dataset[Any]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """The data of rows: load([row, ...], template="internlm2")."""
    monkeypatch.chdir(tmp_path)

    def loaded(rows: list[dict[str, Any]], **settings: Any) -> Dataset[Any]:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"template": "internlm2", "max_length": 128, **settings}
        return load_pairs(Preferences(files=("rows.jsonl",), **given), TOKENIZER)

    return loaded


def make_pairs(data: Dataset[Any], template: str = "internlm2") -> list[dict[str, np.ndarray]]:
    return list(pairs(data.train, answer_suffix(Template(template, TOKENIZER), TOKENIZER)))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def row(prompt: Any = "What is rain?", chosen: str = "Water.", rejected: str = "Fire.", **more: Any) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def learned_until(template: str, turns: list[tuple[str, str]]) -> list[int]:
    """The whole conversation's tokens up to the last that SFT would learn."""
    conversation = Conversation(tuple(Turn(*turn) for turn in turns), origin="test")
    tokens, weights = tokenize([Template(template, TOKENIZER).render(conversation)], TOKENIZER)[0]
    return tokens[: np.flatnonzero(weights)[-1] + 1].tolist()


@pytest.mark.parametrize("template", ["internlm2", "alpaca", "chatml", "melting.jinja"])
def test_prompt_and_answer_are_the_tokens_of_the_whole_conversation(load: Load, template: str) -> None:
    Path("melting.jinja").write_text(MELTING)
    merged = "How is the wea"
    data = load([row(merged, "ther? Fine.", "sel doing?"), row("Rain", "\n.", "")], template=template)
    for pair, (prompt, *answers) in zip(
        make_pairs(data, template), [(merged, "ther? Fine.", "sel doing?"), ("Rain", "\n.", "")], strict=True
    ):
        for side, answer in zip(("chosen_ids", "rejected_ids"), answers, strict=True):
            whole = [*pair["prompt_ids"].tolist(), *pair[side].tolist()]
            assert whole == learned_until(template, [("user", prompt), ("assistant", answer)])
            assert len(pair[side]) > 0


def test_one_beginning_and_one_end(load: Load) -> None:
    [pair] = make_pairs(load([row()]))
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    for side, text in (("chosen_ids", "Water."), ("rejected_ids", "Fire.")):
        whole = [*pair["prompt_ids"].tolist(), *pair[side].tolist()]
        assert whole.count(TOKENIZER.bos_token_id) == 1
        assert whole[0] == TOKENIZER.bos_token_id
        assert TOKENIZER.eos_token_id not in whole
        assert pair[side].tolist().count(end) == 1
        assert pair[side][-1] == end
        assert TOKENIZER.decode(pair[side]).removesuffix("<|im_end|>").strip() == text
    assert TOKENIZER.decode(pair["prompt_ids"]).endswith("<|im_start|>assistant\n")


def test_a_rows_own_system_turn_stays_and_its_condition_does_not(load: Load) -> None:
    own = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    data = load([row(own, condition="brief"), row("Hello", condition="brief", margin=0.5)])
    with_system, without = (TOKENIZER.decode(pair["prompt_ids"]) for pair in make_pairs(data))
    assert "Be kind." in with_system
    assert "system" not in without
    assert "2 rows have a condition, which a policy is not given" in data.report.notes
    assert "1 rows have a margin, which a policy is not given" in data.report.notes


WEATHER = [
    {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    },
    {"role": "tool", "content": "31 degrees"},
    {"role": "assistant", "content": "It is hot."},
]


@pytest.mark.parametrize("template", ["internlm2", "qwen", "melting.jinja"])
def test_of_an_answer_of_several_turns_the_assistants_are_learned(load: Load, template: str) -> None:
    """As SFT learns them: neither a tool's output and a user's turn inside of it, nor their headers."""
    Path("melting.jinja").write_text(MELTING)
    answer = [WEATHER[1] | {"role": "user"} if turn["role"] == "tool" else turn for turn in WEATHER]
    if template == "melting.jinja":  # it shows no calls
        answer[0] = {name: value for name, value in answer[0].items() if name != "tool_calls"}
    else:
        answer = WEATHER
    rows = [{"prompt": "Is Rome hot?", "chosen": answer, "rejected": "I do not know."}]
    data = load(rows, template=template)
    [pair] = make_pairs(data, template)
    learned = TOKENIZER.decode(pair["chosen_ids"][pair["chosen_learned"]])
    assert "Let me look." in learned
    assert "It is hot." in learned
    assert "31 degrees" not in learned
    assert "31 degrees" in TOKENIZER.decode(pair["chosen_ids"])
    assert pair["rejected_learned"].all()
    [labeled, _] = labeled_answers(
        load_labels(Preferences(files=("rows.jsonl",), template=template, max_length=128), TOKENIZER).train,
        answer_suffix(Template(template, TOKENIZER), TOKENIZER),
    )
    assert np.array_equal(
        labeled["completion_ids"][labeled["completion_learned"]], pair["chosen_ids"][pair["chosen_learned"]]
    )
    conversation = conversation_reader().read({"messages": [user("Is Rome hot?"), *answer]}, "test")
    tokens, weights = tokenize([Template(template, TOKENIZER).render(conversation)], TOKENIZER)[0]
    sft = tokens[np.flatnonzero(weights)].tolist()
    # a token that holds the prompt's end and the answer's beginning is learned, too
    assert pair["chosen_ids"][pair["chosen_learned"]].tolist()[-len(sft) :] == sft


def test_every_pair_of_a_list_once_and_no_ties(load: Load) -> None:
    answers = ["one", "two", "three", "four"]
    data = load([{"prompt": "Count", "answers": answers, "ranks": [1, 2, 2, 3]}])
    conversations = [
        tuple(
            TOKENIZER.decode(pair[side]).removesuffix("<|im_end|>").strip()
            for side in ("chosen_ids", "rejected_ids")
        )
        for pair in make_pairs(data)
    ]
    assert sorted(conversations) == sorted(
        [("one", "two"), ("one", "three"), ("one", "four"), ("two", "four"), ("three", "four")]
    )


def test_a_cut_prompt_is_cut_alike_for_both_answers(load: Load) -> None:
    long = " ".join(["rain"] * 60)
    data = load([row(long, "Water falls.", "Fire.")], max_length=40, too_long="cut")
    [pair] = make_pairs(data)
    lengths = [len(pair["prompt_ids"]) + len(pair[side]) for side in ("chosen_ids", "rejected_ids")]
    assert max(lengths) == 40 - 1  # the line break behind the answer was fitted, too
    assert TOKENIZER.decode(pair["chosen_ids"]).strip() == "Water falls.<|im_end|>"


def test_rows_that_contradict_each_other_are_counted(load: Load) -> None:
    brief, detailed = row(condition="brief"), row(chosen="Fire.", rejected="Water.", condition="detailed")
    notes = load([brief, detailed, row("Another"), row("Another")]).report.notes
    assert [note for note in notes if "contradict" in note] == [
        "2 rows to train on prefer what another one rejects: without conditions they contradict each other; "
        "keep those of one side"
    ]
    assert not any("contradict" in note for note in load([brief, brief]).report.notes)


def test_what_is_left_out_is_counted_from_the_cache_too(load: Load) -> None:
    rows = [row(condition="brief")]
    assert load(rows).report.notes == load(rows).report.notes != []


def test_a_weight_is_refused_by_file_and_line_and_0_switches_off(load: Load) -> None:
    assert len(load([row(), row("Off", weight=0), row("On", weight=1.0)]).train) == 2
    with pytest.raises(UserError, match=r'rows\.jsonl:2: "weight" is 2, and TRL'):
        load([row(), row("Twice", weight=2)])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(chosen="Same", rejected="Same"), "both better and worse"),
        ({"prompt": "a", "chosen": "b"}, "rejected"),
        (row(" ".join(["rain"] * 200)), "more than max_length"),
    ],
)
def test_bad_rows_name_their_line(load: Load, bad: dict, message: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{message}"):
        load([row(), bad])
