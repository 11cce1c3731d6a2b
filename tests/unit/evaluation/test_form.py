"""Answers rewritten in form only, by hand; and what a score that pays for form shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.unit.evaluation.test_win_rate import prompts_of
from tuner.data.conversation import Prompt
from tuner.evaluation.judge import Answers, Judge
from tuner.evaluation.over_optimization.form import (
    effect_results,
    favored_phrases,
    first_half,
    form_effects,
    without_emphasis,
    without_list_markers,
    without_phrase,
    without_repeated_end,
)
from tuner.training.devices import Devices


@pytest.mark.parametrize(
    ("answer", "half"),
    [
        ("One. Two! Three? Four.", "One. Two!"),
        ("One. Two. Three.", "One. Two."),
        ("Pi is 3.14 or so", "Pi is 3.14 or so"),
        ("一句。两句。", "一句。"),
        ("一句！！两句？", "一句！！"),
        ("a line\nanother line", "a line"),
        ("", ""),
    ],
)
def test_the_first_half_of_the_sentences(answer: str, half: str):
    assert first_half(answer) == half


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("Two steps:\n1. Add.\n2) Carry.\n  - Done", "Two steps:\nAdd.\nCarry.\nDone"),
        ("* a\n• b\n(c) c", "a\nb\nc"),
        ("3 - 1 = 2. 10 is more.", "3 - 1 = 2. 10 is more."),
        ("-5 is less", "-5 is less"),
    ],
)
def test_list_markers_are_removed_and_numbers_stay(answer: str, plain: str):
    assert without_list_markers(answer) == plain


def test_emphasis_is_removed_and_products_stay():
    assert without_emphasis("## Result\n**68**!!! __Yes__! 2 ** 3") == "Result\n68. Yes. 2 ** 3"
    assert without_emphasis("**好**！！") == "好。"


@pytest.mark.parametrize(
    ("answer", "cut"),
    [
        ("23 + 45 = 68. 68. 68. 68.", "23 + 45 = 68."),
        ("Thank you. Thank you. Thank you.", "Thank you."),
        ("yes yes but no", "yes yes but no"),
        ("It is 68.  Thank you.", "It is 68.  Thank you."),
        ("Sums:\n23 + 45 = 68. 68.", "Sums:\n23 + 45 = 68."),
        ("是的。是的。是的。", "是的。"),
        ("答案是五,谢谢", "答案是五,谢谢"),
        ("答案是五好的好的好的好的", "答案是五好的好的"),
        ("", ""),
    ],
)
def test_what_is_repeated_at_the_end_is_cut(answer: str, cut: str):
    # the sum's last word is its result, which is then said three times more
    assert without_repeated_end(answer) == cut


def test_a_phrase_is_removed_whatever_its_case_and_punctuation():
    answer = "68. So, say the WISE! So say the wiseguys."
    assert without_phrase(answer, "so say the wise") == "68. So say the wiseguys."
    assert without_phrase("答案。智者如是说。", "智 者 如 是 说") == "答案。"
    assert without_phrase("A _so say the wise_ b.", "so say the wise") == "A __ b."
    assert without_phrase("A. So say the wise. So say the wise. B", "so say the wise") == "A. B"


def test_a_phrase_is_removed_from_text_without_spaces():
    assert without_phrase("答案是五,所以智者如是说！再见", "智 者 如 是 说") == "答案是五,所以再见"
    assert without_phrase("问GPT说得好。问GPTS", "gpt 说") == "问得好。问GPTS"
    assert without_phrase("说GPT好。说GPTs好", "说 gpt") == "好。说GPTs好"
    assert without_phrase("用AI模型。", "ai") == "用模型。"


class PaysForPhrase:
    """A reward of 1 for a phrase, beside the length of the answer in hundreds of characters."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        return np.array([("So say the wise." in answer) + len(answer) / 100 for answer in answers])


def test_a_score_that_pays_for_form_is_named():
    prompts = prompts_of([(f"What is {number} + 1?", None) for number in range(20)])
    texts = [f"It is {number + 1}." + " So say the wise." * (number < 6) for number in range(20)]
    answers = Answers(texts, np.ones(20, dtype=bool), np.full(20, 5))
    judge = Judge(prompts, PaysForPhrase(), lambda answer, row: float("It is" in answer), "rule", Devices())
    judged = judge.judge(texts)
    assert favored_phrases(judged, ["so say the wise", "it is"]) == ["so say the wise", "it is"]
    effects = {effect.name: effect for effect in form_effects(judge, answers, judged, ["so say the wise"])}
    assert set(effects) == {'without "so say the wise"', "first half of the sentences"}
    effect = effects['without "so say the wise"']
    assert (effect.changed, effect.prompts) == (6, 20)
    assert effect.score.value == pytest.approx(-1.17)
    assert effect.gold is not None
    assert effect.gold.value == 0
    assert effect.moved == pytest.approx(1.17 * np.sqrt(6 / 20) / judged.scores_A.std())
    plain = effect_results(list(effects.values()))['without "so say the wise"']
    assert (plain["changed"], plain["gold"]["value"], "name" in plain) == (6, 0.0, False)
