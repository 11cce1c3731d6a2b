"""Policies compared, as people see them: lines in the terminal, and a page that hostile texts cannot break."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from tests.unit.display.test_card_page import HOSTILE, SHOWN, Page
from tests.unit.evaluation.test_win_rate import policy, prompts_of, two
from tuner.display.win_page import LARGEST, policy_html, policy_terminal
from tuner.evaluation import win_rate
from tuner.evaluation.win_rate import PolicyCard, policy_card, results
from tuner.evaluation.win_rate import _figures as figures_of


def lines(card: PolicyCard, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(policy_terminal(card))
    return console.file.getvalue()


def many(wins: int = 83, losses: int = 17, golds=((0,), (0,)), name: str = "theirs", **options) -> PolicyCard:
    prompts = prompts_of([(f"question {place}", options.get("condition")) for place in range(wins + losses)])
    count = len(prompts)
    ours = policy(
        "ours", prompts, [1.0] * wins + [-1.0] * losses, list(golds[0]) * count, options.get("texts")
    )
    return policy_card(ours, [policy(name, prompts, [0.0] * count, list(golds[1]) * count)])


def test_the_direction_is_in_words():
    text = lines(many())
    assert "ours wins 83% [74, 89] against theirs by the reward model: better." in text
    assert "ours wins 50% [48, 52] against theirs by the gold rule: undecided." in text
    assert "83/0/17" in text


def test_a_rule_that_disagrees_is_a_warning():
    text = lines(many(golds=((0,), (1,))))
    assert "ours wins 0% [0, 4] against theirs by the gold rule: worse." in text
    assert "the policy exploits the reward model" in text
    page = policy_html(many(golds=((0,), (1,))), "ours")
    assert 'class="verdict failed"' in page
    assert "Reward model and gold rule disagree against theirs" in page


def test_the_page_of_a_rule_reward_names_no_reward_model():
    card = replace(many(golds=((0,), (1,))), scorer="reward rule")
    for text in (lines(card), policy_html(card, "ours")):
        assert "reward model" not in text.lower()
        assert "by the reward rule" in text
    alone = replace(card, matches=())
    assert "By the reward rule." in policy_html(alone, "ours")


def test_figures_are_computed_once(monkeypatch):
    card, calls = two(), []
    monkeypatch.setattr(win_rate, "_figures", lambda *given: calls.append(given) or figures_of(*given))
    policy_html(card, "ours")
    policy_terminal(card)
    results(card)
    groups = 1 + len(card.policy.judged.conditions())
    assert len(calls) == 2 * groups


def test_lines_fit_and_are_the_same_without_colors():
    for width in (80, 120):
        assert max(map(len, lines(two(), width).splitlines())) <= width


def test_page_holds_bars_and_answers_side_by_side():
    page = policy_html(many(), "ours")
    parsed = Page(page)
    assert parsed.open == []
    assert not re.search(r"https?:|url\(|@import|\bsrc=|href=|<script", page)
    # bars run from x = 148 to 448: 83 of 100 are 249 pixels wide, and so far is the dot
    assert re.search(r'class="a area" x="148.0" y="[\d.]+" width="249.0"', page)
    assert re.search(r'class="rate" cx="397.0"', page)
    text = " ".join(parsed.text.split())
    assert f"Largest wins against theirsOf ours by the reward model. The first {LARGEST} of 83." in text
    assert "All 100 prompts, answered by ours and theirs" in text
    assert text.count("ours 99") == 2, "a loss is shown among the largest, and among all"
    assert page.count("<article>") == 2 * LARGEST + 100


def test_a_policy_alone_has_its_lowest_scores():
    prompts = prompts_of([("a", None), ("b", None)])
    page = policy_html(policy_card(policy("ours", prompts, [1, 0]), []), "ours")
    assert page.index("ours 1") < page.index("ours 0")
    assert "Lowest scores" in page
    assert "against" not in page.split("</style>")[1].split('class="method"')[0]


def test_without_a_rule_there_is_a_page_by_the_reward_model_alone():
    prompts = prompts_of([("a", None)])
    card = policy_card(policy("ours", prompts, [1]), [policy("theirs", prompts, [0])])
    assert "by the reward model" in policy_html(card, "ours")
    assert "gold" not in lines(card)


@pytest.mark.parametrize("where", ["name", "title", "condition", "answer"])
def test_hostile_texts_stay_texts(where):
    options = {
        "name": {"name": HOSTILE},
        "condition": {"condition": HOSTILE},
        "answer": {"texts": [HOSTILE] * 100},
    }
    card = many(**options.get(where, {}))
    page = policy_html(card, HOSTILE if where == "title" else "ours")
    assert SHOWN in page
    assert "<script" not in page
    assert not re.search("[\x1b\u202e\ud800]", page)
    assert Page(page).open == []
    page.encode()
    assert not re.search("[\x1b\u202e\ud800]", lines(card))
