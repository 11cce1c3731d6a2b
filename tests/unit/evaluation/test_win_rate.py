"""Win rates by hand: intervals, ties, conditions, prompts that belong together."""

import json
import math

import numpy as np
import pytest

from tuner.data.conversation import Prompt, Turn
from tuner.data.prompts import PromptCollector, PromptSet
from tuner.display.win_page import sentences
from tuner.evaluation.intervals import mean, share, sign_test, win_share
from tuner.evaluation.judge import Answers, Judge, JudgedAnswers
from tuner.evaluation.position_loss import RangeLoss
from tuner.evaluation.win_rate import (
    ALL,
    TIE,
    Contestant,
    PolicyCard,
    clusters,
    judge_all,
    outcomes,
    policy_card,
    results,
)


def prompts_of(questions: list[tuple[str, str | None]]) -> PromptSet:
    """(what is asked, under which condition)."""
    collector = PromptCollector()
    for line, (question, condition) in enumerate(questions, 1):
        prompt = Prompt((Turn("user", question),), condition=condition)
        collector.add((np.arange(3, dtype=np.int32), prompt), 0, "prompts.jsonl", line)
    prompts = collector.finish()
    assert prompts is not None
    return prompts


def policy(name: str, prompts: PromptSet, scores, golds=None, texts=None) -> Contestant:
    count = len(prompts)
    texts = texts or [f"{name} {place}" for place in range(count)]
    answers = Answers(texts, np.arange(count) % 4 > 0, np.full(count, 7))
    golds_A = None if golds is None else np.array(golds, dtype=np.float64)
    return Contestant(
        name,
        f"runs/{name}",
        answers,
        JudgedAnswers(prompts, texts, np.array(scores, dtype=np.float64), golds_A),
    )


def signs(wins: int, losses: int, ties: int = 0) -> np.ndarray:
    return np.array([1.0] * wins + [-1.0] * losses + [0.0] * ties)


def apart(values) -> np.ndarray:
    """Every prompt for itself."""
    return np.arange(len(values))


# Intervals


def test_without_ties_it_is_wilsons_interval():
    interval = win_share(signs(8, 2), np.arange(10))  # Wilson's for 8 of 10 is 0.490 to 0.943
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_published_interval_of_paired_proportions():
    # Tango (1998) on 12 and 2 of 50 pairs: the difference 0.2 lies within 0.0611 and 0.3447
    interval = win_share(signs(12, 2, 36), np.arange(50))
    assert (2 * interval.low - 1, 2 * interval.high - 1) == pytest.approx((0.0611, 0.3447), abs=1e-4)


def test_all_ties_are_half_with_a_width():
    # the bounds are 1/2 -+ z^2 / (2 (n + z^2)): 3.8415 / (2 * 103.8415) = 0.0185
    interval = win_share(signs(0, 0, 100), np.arange(100))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.4815, 0.5185), abs=1e-4)


@pytest.mark.parametrize(
    ("wins", "losses", "ties"), [(8, 2, 0), (12, 2, 36), (3, 0, 0), (0, 5, 5), (7, 7, 1)]
)
def test_bounds_are_where_the_score_test_is_at_its_edge(wins, losses, ties):
    """The restricted likelihood found by search, not by the closed form."""
    count = wins + losses + ties
    interval = win_share(signs(wins, losses, ties), np.arange(count))
    for bound in (interval.low, interval.high):
        difference = 2 * bound - 1
        if abs(difference) > 1 - 1e-6:
            continue
        losing = np.linspace(max(0.0, -difference), (1 - difference) / 2, 400_001)[1:-1]
        with np.errstate(divide="ignore"):
            likelihood = (
                wins * np.log(losing + difference)
                + losses * np.log(losing)
                + (ties * np.log1p(-2 * losing - difference) if ties else 0)
            )
        likely = losing[np.argmax(likelihood)]
        variance = count * (2 * likely + difference - difference**2)
        assert (wins - losses - count * difference) ** 2 / variance == pytest.approx(1.959964**2, rel=2e-2)


def test_win_rates_mirror_each_other():
    for signs_A in (signs(8, 2), signs(3, 0, 9), signs(0, 0, 4)):
        clusters_A = np.arange(len(signs_A)) // 2
        interval, other = win_share(signs_A, clusters_A), win_share(-signs_A, clusters_A)
        assert (interval.value, interval.low, interval.high) == pytest.approx(
            (1 - other.value, 1 - other.high, 1 - other.low)
        )
        assert sign_test(signs_A, clusters_A) == pytest.approx(sign_test(-signs_A, clusters_A))


def test_prompts_that_belong_together_count_as_fewer():
    once, repeated = signs(8, 2), np.repeat(signs(8, 2), 3)
    interval = win_share(repeated, np.repeat(np.arange(10), 3))
    assert (interval.low, interval.high) == pytest.approx(
        (win_share(once, np.arange(10)).low, win_share(once, np.arange(10)).high)
    )
    assert sign_test(repeated, np.repeat(np.arange(10), 3)) == pytest.approx(sign_test(once, np.arange(10)))
    ties = win_share(np.zeros(30), np.repeat(np.arange(10), 3))
    assert ties.low == pytest.approx(win_share(np.zeros(10), np.arange(10)).low)


def test_sign_test_by_hand():
    # 8 of 10: 2 (45 + 10 + 1) / 1024; ties say nothing
    assert sign_test(signs(8, 2, 5), np.arange(15)) == pytest.approx(112 / 1024)
    assert sign_test(signs(0, 0, 3), np.arange(3)) == 1.0
    assert sign_test(signs(1, 0), np.arange(1)) == 1.0
    # a question of 2 wins and one of a win: sums 3, 1, -1, -3 are as likely
    assert sign_test(signs(3, 0), np.array([0, 0, 1])) == pytest.approx(0.5)


def test_mean_and_share_by_hand():
    interval = mean(np.array([1.0, 2.0, 3.0, 4.0]), np.arange(4))
    half = 1.959964 * math.sqrt(5) / 4  # squared deviations add up to 5
    assert (interval.value, interval.low, interval.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    gold = share(np.array([1.0] * 8 + [0.0] * 2), np.arange(10))
    assert (gold.low, gold.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    sure = share(np.ones(10), np.arange(10))
    assert (sure.low, sure.high) == pytest.approx((10 / (10 + 1.959964**2), 1.0))


# Policies compared


def test_learned_scores_tie_when_near_and_gold_scores_when_equal():
    own, other = np.array([1.0, 1.0, 1.0]), np.array([1 - TIE / 2, 1 - 2 * TIE, 2.0])
    assert outcomes("score", own, other).tolist() == [0, 1, -1]
    assert outcomes("gold", own, other).tolist() == [1, 1, -1]
    assert outcomes("gold", own, own).tolist() == [0, 0, 0]


def two() -> PolicyCard:
    prompts = prompts_of([("a", "polite"), ("b", "polite"), ("c", "json"), ("d", None)])
    own = policy("ours", prompts, [1, 2, 0, 5], [1, 0, 0, 1])
    other = policy("theirs", prompts, [0, 3, 0, 4], [1, 1, 0, 0])
    return policy_card(own, [other], [RangeLoss(0, 256, 20, 10)])


def test_wins_over_all_prompts_and_by_condition():
    (match,) = two().matches
    score, gold = match.rates["score"], match.rates["gold"]
    assert (score[ALL].wins, score[ALL].ties, score[ALL].losses) == (2, 1, 1)
    assert score[ALL].rate.value == 0.625
    assert score[ALL].difference.value == 0.25
    assert list(score) == [ALL, "polite", "json"]
    assert score["polite"].rate.value == score["json"].rate.value == 0.5
    assert score["json"].ties == 1
    assert (gold[ALL].wins, gold[ALL].ties, gold[ALL].losses) == (1, 2, 1)


def test_the_other_way_round_is_the_rest():
    card = two()
    back = policy_card(card.matches[0].other, [card.policy]).matches[0]
    for judge, rates in card.matches[0].rates.items():
        for name, rate in rates.items():
            assert back.rates[judge][name].rate.value == 1 - rate.rate.value
            assert back.rates[judge][name].p == rate.p


def test_a_policy_against_itself_ties_everywhere():
    own = two().policy
    card = policy_card(own, [own])
    (match,) = card.matches
    for rates in match.rates.values():
        for rate in rates.values():
            assert (rate.rate.value, rate.wins, rate.losses, rate.p) == (0.5, 0, 0, 1.0)
    assert all("undecided" in sentence for sentence in sentences(card, match))


def test_without_a_rule_there_is_the_reward_model_alone():
    prompts = prompts_of([("a", None)])
    card = policy_card(policy("ours", prompts, [1]), [policy("theirs", prompts, [0])])
    assert list(card.matches[0].rates) == ["score"]
    values = results(card)
    assert "gold" not in values
    assert "replay" not in values
    assert values["conditions"] == {}


def test_questions_under_several_conditions_belong_together():
    prompts = prompts_of([("a", "polite"), ("b", "polite"), ("a", "json"), ("b", None)])
    assert clusters(prompts).tolist() == [0, 1, 0, 1]


def test_equal_answers_are_judged_once(monkeypatch):
    """bf16 would give the same text other scores in another pass."""
    prompts = prompts_of([("a", None), ("b", None)])
    seen = []

    def judge(self, texts):
        seen.extend(
            zip(
                [self.prompts.prompt(index).turns[0].content for index in range(len(texts))],
                texts,
                strict=True,
            )
        )
        return JudgedAnswers(self.prompts, texts, np.arange(float(len(texts))), None)

    monkeypatch.setattr(Judge, "judge", judge)
    answers = [Answers(texts, np.ones(2, bool), np.ones(2)) for texts in (["x", "y"], ["x", "x"], ["y", "y"])]
    judged = judge_all(Judge(prompts, None, None, "", None), answers)  # type: ignore[arg-type]
    assert seen == [("a", "x"), ("b", "y"), ("b", "x"), ("a", "y")]
    assert [policy_scores.scores_A.tolist() for policy_scores in judged] == [[0, 1], [0, 2], [3, 1]]


def test_measures_of_one_policy():
    figures = two().policy.figures
    assert figures[ALL].score.value == 2.0
    assert figures[ALL].gold is not None
    assert figures[ALL].gold.value == 0.5
    assert (figures[ALL].ended, figures[ALL].length, figures[ALL].prompts) == (0.75, 7.0, 4)
    assert figures["polite"].prompts == 2


def test_results_are_plain_values():
    values = json.loads(json.dumps(results(two())))
    assert values["score"]["value"] == 2.0
    assert values["replay"] == 2.0
    assert values["positions"] == [{"from": 0, "to": 256, "loss": 2.0}]
    (other,) = values["against"]
    assert (other["name"], other["path"]) == ("theirs", "runs/theirs")
    assert other["wins"]["score"]["rate"]["value"] == 0.625
    assert other["wins"]["conditions"]["json"]["gold"]["ties"] == 1
