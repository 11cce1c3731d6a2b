"""Context tasks: where facts stand, that their answers follow from the text, and what is made of a model's answers."""

import io
import re

import pytest
from rich.console import Console

from tuner.data.conversation import Turn
from tuner.errors import UserError
from tuner.evaluation import context_scores
from tuner.evaluation.context_scores import ContextScores, score_context
from tuner.evaluation.context_tasks import TASKS, WORDINGS, ContextRow, context_rows, refuse_unknown_tasks
from tuner.models.chat import open_chat
from tuner.stages.evaluate_context import evaluate_context


def words(prompt: str) -> int:
    """A tokenizer of words, and of single characters where there are none."""
    return len(re.findall(r"[a-zA-Z]+|\d|\S", prompt))


def rows(task, **options):
    return list(context_rows(task, words, **{"lengths": (300, 600), "count": 4} | options))


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_their_length_and_are_the_same_again(task):
    drawn = rows(task)
    assert len(drawn) == 2 * 5 * 4
    assert drawn == rows(task)
    assert drawn != rows(task, seed=1)
    # a row does not depend on those before it
    assert drawn[-1] == rows(task, lengths=(600,), depths=(1.0,))[-1]
    for row in drawn:
        assert row.length - 20 <= words(row.prompt) <= row.length
        assert row.language == ("zh" if "请阅读" in row.prompt else "en")


@pytest.mark.parametrize("task", ["needle", "multikey"])
def test_the_fact_stands_at_its_depth(task):
    for row in rows(task):
        fact, key = answering_fact(row)
        before, _, after = row.prompt.partition(fact)
        _, _, before = before.partition("\n\n")
        after = after.partition("\n\n")[0]
        assert len(before) / (len(before) + len(after)) == pytest.approx(row.depth, abs=0.12)
        facts = re.findall(r"is (\d{4})|号码是(\d{4})", row.prompt)
        assert len(facts) == (1 if task == "needle" else 4)
        assert key in row.prompt.rpartition("\n\n")[2]


def answering_fact(row):
    """(the sentence with the answer, the key it names)."""
    words_of = WORDINGS[row.language]
    for key in words_of.keys:
        if words_of.question.format(key=key) == row.prompt.rpartition("\n\n")[2]:
            fact = words_of.fact.format(key=key, value=row.answer)
            assert row.prompt.count(fact) == 1
            return fact, key
    raise AssertionError(row.prompt)


def test_a_chain_leads_to_its_value():
    for row in rows("trace"):
        assignments = re.findall(r"VAR ([A-Z]{3}) = (?:VAR ([A-Z]{3})|(\d{4}))\.", row.prompt)
        assert len(assignments) == 6
        values = {}
        for (
            name,
            source,
            value,
        ) in assignments:  # in the order of the text: each source is known before it is used
            values[name] = value or values[source]
        assert len(set(values.values())) == 2
        asked = re.findall(r"VAR ([A-Z]{3})", row.prompt)[-1]
        assert values[asked] == row.answer


def test_a_length_without_room_is_refused():
    with pytest.raises(UserError, match=r"--lengths 20: the facts and the question alone are \d+ tokens"):
        rows("needle", lengths=(20,))


def test_unknown_tasks_are_refused_with_the_list():
    with pytest.raises(UserError, match="no task named 'haystack'; there are multikey, needle, trace"):
        refuse_unknown_tasks(["needle", "haystack"])


def test_scores_by_length_and_depth():
    drawn = [ContextRow("", "1", length, depth, "en") for length in (1, 2) for depth in (0.0, 1.0)]
    scores = ContextScores("needle", drawn, [True, False, True, True])
    assert scores.accuracy == 0.75
    assert scores.by("length") == {(1,): 0.5, (2,): 1.0}
    assert scores.by("length", "depth")[1, 1.0] == 0.0


def test_a_model_is_right_where_its_answer_has_the_value(monkeypatch):
    """Run on the embedded model, which knows no fact, and on rows whose answers are what it says."""
    chat = open_chat("tuner:tiny")
    options = {"lengths": (256,), "depths": (0.5,), "count": 2}
    assert score_context(chat, "needle", **options).right == [False, False]
    prompts = [row.prompt for row in score_context(chat, "needle", **options).rows]
    said = ["".join(chat.answer([Turn("user", prompt)], max_new_tokens=64)).strip() for prompt in prompts]
    rows = [ContextRow(prompt, text[:8], 256, 0.5, "en") for prompt, text in zip(prompts, said, strict=True)]
    monkeypatch.setattr(context_scores, "context_rows", lambda *_, **__: iter(rows))
    assert score_context(chat, "needle", **options).right == [True, True]


def test_tasks_of_a_model(tmp_path):
    evaluation = evaluate_context("tuner:tiny", ["needle", "trace"], [260, 300], count=2)
    assert list(evaluation.results) == ["needle", "trace"]
    assert evaluation.results["trace"]["rows"] == 20
    assert evaluation.results["needle"]["by_length"].keys() == {"260", "300"}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(evaluation.terminal)
    assert "260 tokens" in console.export_text()
