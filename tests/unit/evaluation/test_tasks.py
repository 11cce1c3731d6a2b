"""Tasks: what is read from a file of rows, what is scored of a continuation, and which rows were seen in training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tuner.config import Model
from tuner.data.conversation import Conversation, Turn
from tuner.data.rendered import Rendered
from tuner.errors import UserError
from tuner.evaluation.contamination import contamination, ngram_length
from tuner.evaluation.final_answers import equal_expressions, equal_numbers
from tuner.evaluation.intervals import Interval
from tuner.evaluation.local_task import LocalTask
from tuner.evaluation.task_model import TaskModel, open_task_model
from tuner.evaluation.task_report import Column, TaskReport
from tuner.evaluation.task_rows import read_task
from tuner.evaluation.task_scores import difference, mean_scores
from tuner.resources import chat_templates_folder, locate

CHATML = (chat_templates_folder() / "chatml.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chat() -> TaskModel:
    return open_task_model(Model(path="tuner:tiny"), "fp32", chat_template=CHATML, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def own() -> Any:
    """transformers' own model of the same weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(locate("tuner:tiny"), dtype=torch.float32)


@pytest.fixture(scope="module")
def plain(chat: TaskModel) -> TaskModel:
    return TaskModel(chat.loaded, None, chat.end_ids)


def written(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def question(text: str) -> Conversation:
    return Conversation((Turn("user", text),))


def test_packed_continuations_get_their_own_log_likelihoods(chat: TaskModel, own: Any):
    texts = ["What is 2 + 3?", "a", "Please add 17 and 25, and say no more."]
    samples = [
        chat.continuation(chat.prompt_text(question(text)), answer)
        for text in texts
        for answer in ("5", "It is five, is it not?")
    ]
    small_passes = TaskModel(chat.loaded, chat.template, chat.end_ids, tokens_per_pass=70)
    for sample, (logprob, greedy), other in zip(
        samples, chat.logprobs(samples), small_passes.logprobs(samples), strict=True
    ):
        tokens, places = torch.from_numpy(sample[0]).long(), np.flatnonzero(sample[1])
        # by transformers' own forward pass, one row alone
        with torch.no_grad():
            logprobs_TV = own(tokens[None]).logits[0].log_softmax(-1)
        rows = torch.from_numpy(places) - 1
        expected = logprobs_TV[rows, tokens[places]].sum().item()
        # fp32 sums of up to 12 terms of about 10
        assert (logprob, other[0]) == pytest.approx((expected, expected), abs=2e-4)
        assert greedy == other[1] == bool((logprobs_TV[rows].argmax(-1) == tokens[places]).all())


def test_what_the_model_itself_answers_is_greedy(chat: TaskModel):
    prompt = chat.prompt_text(question("What is 2 + 3?"))
    tokens = chat.encode(prompt)
    text = chat.answers([tokens], 6)[0]
    sample = chat.continuation(prompt, text)
    assert chat.logprobs([sample])[0][1]
    changed = np.where(np.arange(len(sample[0])) == len(sample[0]) - 1, 5, sample[0]).astype(np.int32)
    assert not chat.logprobs([(changed, sample[1])])[0][1]


def test_a_templates_last_line_break_is_context_and_a_plain_texts_last_space_is_not(chat, plain):
    prompt = chat.prompt_text(question("Hi"))
    assert prompt.text.endswith("assistant\n")
    tokens, weights = chat.continuation(prompt, "yes")
    assert chat.loaded.tokenizer.decode(tokens[weights > 0]) == "yes"
    tokens, weights = plain.continuation(Rendered("The answer: "), "yes")
    assert plain.loaded.tokenizer.decode(tokens[weights > 0]) == " yes"


def test_a_question_is_not_cut_for_the_room_of_a_long_answer(chat: TaskModel):
    prompt = chat.encode(chat.prompt_text(question("What is 2 + 3?")))
    half = len(prompt) + 2
    short = TaskModel(chat.loaded, chat.template, chat.end_ids)
    object.__setattr__(short, "max_length", 2 * half)
    assert short.answers([prompt], 1000) == chat.answers([prompt], half)
    assert (short.cut, short.curbed) == ([], {1000: half})
    # a longer question loses its beginning, and that is told
    longer = [*prompt, *prompt]
    assert short.answers([longer], 1000) == chat.answers([longer[-half:]], half)
    assert short.cut == [len(longer)]


def test_stop_texts_end_answers(chat: TaskModel):
    tokens = chat.encode(chat.prompt_text(question("In the beginning")))
    whole = chat.answers([tokens], 12)[0]
    middle = whole[3:6]
    assert chat.answers([tokens], 12, [middle]) == [whole[: whole.index(middle)]]


def test_the_share_of_rows_answered_rightly(chat: TaskModel, tmp_path: Path):
    prompts = ["What is 2 + 3?", "In the beginning God created"]
    answers = chat.answers([chat.encode(chat.prompt_text(question(text))) for text in prompts], 6)
    rows = [
        {"prompt": prompts[0], "answer": answers[0]},
        {"prompt": prompts[1], "answer": "nothing that a model would say"},
        {"prompt": prompts[1], "regex": "^.|\n"},
    ]
    [scores] = LocalTask("rows", read_task(written(tmp_path, *rows)), 6).measure(chat)
    assert scores.values_A is not None
    assert scores.values_A.tolist() == [1, 0, 1]
    assert scores.value.value == pytest.approx(2 / 3)


def test_the_likeliest_choice_counts_with_its_end(chat: TaskModel, own: Any, tmp_path: Path):
    choices = ["12", "1", "In the beginning"]
    row = {"prompt": "What is 5 + 7?", "choices": choices, "answer": 0}
    task = LocalTask("rows", read_task(written(tmp_path, row)), 6)
    template = chat.template
    assert template is not None
    likelihoods = []
    for choice in choices:
        conversation = Conversation((Turn("user", row["prompt"], learn=False), Turn("assistant", choice)))
        text = template.render(conversation).text.rstrip()
        assert text.endswith(f"{choice}<|im_end|>")
        tokens = torch.tensor([chat.loaded.tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            logprobs_TV = own(tokens).logits[0].log_softmax(-1)
        first = len(chat.encode(chat.prompt_text(question(str(row["prompt"])))))
        rows = torch.arange(first, tokens.shape[1])
        likelihoods.append(logprobs_TV[rows - 1, tokens[0, rows]].sum().item())
    [scores] = task.measure(chat)
    assert scores.value.value == float(np.argmax(likelihoods) == 0)
    best = int(np.argmax(likelihoods))
    [scores] = LocalTask("rows", read_task(written(tmp_path, row | {"answer": best})), 6).measure(chat)
    assert scores.value.value == 1


@pytest.mark.parametrize(
    ("row", "references", "match"),
    [
        ({"prompt": "a", "answer": "b"}, ("b",), "exact"),
        ({"question": "a", "answer": ["b", "c"]}, ("b", "c"), "exact"),
        ({"question": "a", "answer": "so\n#### 72"}, ("so\n#### 72",), "number"),
        ({"question": "a", "answer": 72, "match": "number"}, ("72",), "number"),
        ({"problem": "a", "solution": "\\boxed{7}"}, ("\\boxed{7}",), "math"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            ("b",),
            "exact",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "reference": "c"}, ("c",), "exact"),
        ({"prompt": "a", "regex": "b+"}, ("b+",), "regex"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": "c"}, ("c",), "exact"),
        ({"question": "a", "choices": ["b", "c"], "answer": 1}, ("c",), "exact"),
    ],
)
def test_shapes_of_rows(row, references, match, tmp_path: Path):
    [read] = read_task(written(tmp_path, row))
    assert (read.references, read.match, read.prompt.turns[-1].content) == (references, match, "a")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "no right answer"),
        ({"prompt": "a", "answer": ""}, "no right answer"),
        ({"prompt": "a", "answer": "b", "match": "similar"}, "is exact, number or math"),
        ({"prompt": "a", "regex": "("}, "no pattern"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "no index of 2 choices"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, "is the index"),
        ({"prompt": "a", "choices": ["b", "c"]}, "is the index"),
        ({"answer": "b"}, "not a prompt row"),
    ],
)
def test_rows_that_are_no_tasks(row, message, tmp_path: Path):
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{message}"):
        read_task(written(tmp_path, {"prompt": "a", "answer": "b"}, row))


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("She has 72 clips.", "48 + 24 = 72\n#### 72", True),
        ("48 / 2 = 24, so 24", "#### 72", False),
        ("It costs $1,200.50 in all", "#### 1200.5", True),
        ("-3", "#### 3", False),
        ("#### 5\nThen 6 more.", "5", True),
        ("no number", "#### 5", False),
        ("3" * 5000, "#### 3", False),
    ],
)
def test_numbers(answer, reference, equal):
    assert equal_numbers(answer, reference) is equal


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("so \\boxed{\\frac{1}{2}}", "\\boxed{\\dfrac12}", True),
        ("The answer is 0.5.", "\\boxed{\\frac12}", True),
        ("\\boxed{\\frac{\\sqrt{2}}{2}}", "$\\boxed{\\frac{\\sqrt{3}}{2}}$", False),
        ("\\boxed{x = 5}", "\\boxed{5}", True),
        ("\\boxed{1,000}", "\\boxed{1000}", True),
        ("\\boxed{(3, 4)}", "\\boxed{\\left(3,4\\right)}", True),
        ("\\boxed{\\text{Monday}}", "\\boxed{Monday}", True),
        ("\\boxed{90^\\circ}", "\\boxed{90}", True),
        ("\\boxed{5\\text{ cm}}", "\\boxed{5}", True),
        ("\\boxed{(3)(4)}", "\\boxed{34}", False),
        ("\\boxed{3\\frac12}", "\\boxed{\\frac{31}{2}}", False),
        ("\\boxed{(5)}", "\\boxed{5}", True),
        ("\\boxed{-\\frac{1}{2}}", "\\boxed{-(0.5)}", True),
        ("\\boxed{-(1/2)}", "\\boxed{((-1)/(2))}", True),
        ("\\boxed{1e3}", "\\boxed{1000}", True),
        ("\\boxed{1e999999999}", "\\boxed{1}", False),
        ("\\boxed{}", "\\boxed{}", False),
        ("", "\\boxed{3}", False),
    ],
)
def test_expressions(answer, reference, equal):
    assert equal_expressions(answer, reference) is equal


def test_rows_seen_in_training():
    long = "One two, three four five six seven eight nine ten."
    rows = [
        [long, "an answer"],
        ["one two three four five six SEVEN nine eight ten eleven"],
        ["What is 23 + 45?", "68"],
        ["What is 23 + 46?", "69"],
        ["", ""],
    ]
    training = ["Intro: one two three four, five six seven EIGHT. Outro.", "<|user|>what is 23 + 45<|end|>"]
    compared = contamination(rows, iter(training))
    assert compared.words == 8
    assert compared.seen_A.tolist() == [True, False, True, False, False]
    assert compared.training_rows == 2
    assert (ngram_length([3, 4]), ngram_length([10] * 9), ngram_length([50] * 9)) == (8, 10, 13)


def test_what_test_rows_share_does_not_make_them_seen(tmp_path):
    system = "You are a careful assistant that solves problems step by step."
    instruction = "Answer the following question with a single number and nothing else, please."
    file = tmp_path / "task.jsonl"
    lines = [
        {
            "system": system,
            "prompt": f"{instruction} What is {number} plus {number + 1}?",
            "answer": f"{2 * number + 1}",
        }
        for number in (1, 2, 3)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    rows = [row.texts for row in read_task(str(file))]
    training = [f"{system} {instruction} Which day is it?", f"{instruction} What is 2 plus 3? 5"]
    assert contamination(rows, training).seen_A.tolist() == [False, True, False, False]
    # a row is not shared with its own copy
    assert contamination(rows, [f"{instruction} What is 1 plus 2?"]).seen_A.tolist() == [
        True,
        False,
        False,
        True,
    ]
    # turns of their own that all rows begin with
    shots = [[instruction, f"What is {number} plus one?", str(number)] for number in (1, 2)]
    assert contamination(shots, [instruction]).seen_A.tolist() == [False, False]
    assert contamination(shots, ["what is 2 plus one"]).seen_A.tolist() == [False, True]


def test_chinese_rows_seen_in_training():
    rows = [
        ["中国的首都是哪座城市？"],
        ["请列出三种可再生能源并说明它们各自的优点和缺点"],
        ["法国的首都是哪里？"],
    ]
    training = [
        "问题：请问中国的首都是哪座城市？回答：北京。",
        "好的请列出三种可再生能源并说明它们各自的优点",
    ]
    assert contamination(rows, training).seen_A.tolist() == [True, True, False]


def test_a_change_in_other_values_than_0_and_1_has_the_normal_interval():
    before = mean_scores("t", "f1", np.array([0.5, 0.25, 1, 1]), [["a"]] * 4)
    after = mean_scores("t", "f1", np.array([1.0, 0.25, 1, 1]), [["a"]] * 4)
    change = difference(after, before)
    # differences 1/2, 0, 0, 0: mean 1/8, variance of the mean (9/64 + 3/64) / 16 = 3/256
    assert change == Interval(
        0.125, *(pytest.approx(0.125 + z * (3 / 256) ** 0.5, abs=1e-4) for z in (-1.96, 1.96))
    )


def test_changes_are_paired_and_seen_rows_are_left_out():
    before = mean_scores("t", "accuracy", np.array([0.0, 0, 1, 1]), [["a"]] * 4)
    after = mean_scores("t", "accuracy", np.array([1.0, 0, 1, 1]), [["a"]] * 4)
    seen = contamination([["x"], ["a"], ["a"], ["a"]], ["x"])
    report = TaskReport([Column("base", [before], None), Column("run", [after], 0)], {"t": seen})
    values = report.results()["tasks"]["t"]["accuracy"]["run"]
    # Tango's for one win and no loss in 4: above, Wilson's for 1 in 4; below, the negative root of
    # (1 - 4d)^2 = 4 z^2 ((1 - 7d) / 4 + d (1 - d))
    assert values["change"]["value"] == 0.25
    assert values["change"]["interval"] == pytest.approx([-0.3624, 0.6994], abs=1e-4)
    assert values["unseen"]["value"] == pytest.approx(2 / 3)
    [(title, (names, rows))] = report.tables()
    assert title == "t: accuracy over 4 rows, 1 of them seen in training"
    assert names == ["model", "value", "change", "on unseen rows"]
    assert rows[0][2] is None
    assert rows[1][1].startswith("0.750 [")
    assert rows[1][2].startswith("+0.250 [−0.362")
