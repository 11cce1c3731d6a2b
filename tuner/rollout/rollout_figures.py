"""Figures that every step logs of its rollout, the same on every rank.

Shapes: A answers of the rollout, N answer tokens of a row.
"""

# torch annotates some of its functions only in part
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from tuner.losses.policy import kl_estimate
from tuner.rollout.correlation import pearson, ranks, spearman
from tuner.rollout.experience import Experience
from tuner.rollout.rollout import Rollout
from tuner.rollout.sampler_gap import sampled_logprobs
from tuner.training.devices import Devices, sum_by_name

NGRAM = 4
"""Length in tokens of the phrases that repetition counts."""

TokenFigures = Callable[[Experience], Mapping[str, torch.Tensor]]
"""Figures of a row that one algorithm adds, [N] each; the step logs their means."""


def rollout_figures(
    rollout: Rollout, scores_A: np.ndarray, rewards_A: np.ndarray, golds_A: np.ndarray | None
) -> dict[str, float | None]:
    """Figures per answer: scores, gold scores, rewards, lengths.

    scores_A: before shaping; rewards_A: summed over tokens; golds_A: None without a gold rule. float64.
    """
    gold: dict[str, float | None] = {}
    if golds_A is not None:
        gold = {"gold": float(golds_A.mean()), **_by_condition("gold", rollout, golds_A)}
        gold["gold_top_tenth"] = gold_of_best(scores_A, golds_A)
        gold["gold_auc"] = gold_auc(scores_A, golds_A)
    return {
        "score": float(scores_A.mean()),
        "score_std": float(scores_A.std()),
        "score_min": float(scores_A.min()),
        "score_max": float(scores_A.max()),
        "score_length_correlation": pearson(scores_A, rollout.answer_lengths),
        **_length_ranks(rollout, scores_A),
        **gold,
        "reward": float(rewards_A.mean()),
        **_by_condition("score", rollout, scores_A),
        **_by_condition("reward", rollout, rewards_A),
        "length": float(rollout.answer_lengths.mean()),
        "ended": float(rollout.ended.mean()),
        "repetition": float(np.mean([repetition(answer.tokens) for answer in rollout.answers])),
        **({"masked": 1 - float(rollout.learned.mean())} if rollout.masks_truncated else {}),
        "prompts": rollout.num_prompts,
    }


def token_means(
    rollout: Rollout, experiences: Sequence[Experience], further: TokenFigures, devices: Devices
) -> dict[str, float]:
    """Means over all answer tokens of all ranks: KL, entropy, the generator's gap, and further figures.

    With a reference also `kl_per_answer`: k1 summed over an answer's tokens, its mean over the answers.
    """
    # Sums first, one division after: a mean of the ranks' means would weight short answers more.
    sums = devices.sum(sum_by_name([_token_sums(rollout, experience, further) for experience in experiences]))
    tokens = sums.pop("tokens")
    per_answer = {"kl_per_answer": sums["kl"] / len(rollout)} if "kl" in sums else {}
    return {name: total / tokens for name, total in sums.items()} | per_answer


def split_best(rollout: Rollout, scores_A: np.ndarray) -> tuple[list[str], list[str]]:
    """Texts of the best-scored tenth of the answers, and of the others; of equal scores, earlier answers are better."""
    order: list[int] = np.argsort(-scores_A, kind="stable").tolist()  # NaN comes last
    texts, places = [rollout.texts[index] for index in order], num_best(len(rollout))
    return texts[:places], texts[places:]


def num_best(count: int) -> int:
    """Answers in the best-scored tenth of `count` answers: a tenth rounded down, at least 1."""
    return max(1, count // 10)


def gold_of_best(scores_A: np.ndarray, golds_A: np.ndarray) -> float | None:
    """Mean gold score of the best-scored tenth of the answers; None where no score is a number.

    Of answers with equal scores at its border, each counts with the same part, so that their order does not matter.
    Answers whose score is NaN have no place in the order and are left out, of the tenth, too.
    """
    ranked_A = ~np.isnan(scores_A)
    scores_A, golds_A = scores_A[ranked_A], golds_A[ranked_A]
    if not len(scores_A):
        return None
    places = num_best(len(scores_A))
    border = np.sort(scores_A)[-places]
    above_A = scores_A > border
    tied = (places - above_A.sum()) * golds_A[scores_A == border].mean()
    return float((golds_A[above_A].sum() + tied) / places)


def gold_auc(scores_A: np.ndarray, golds_A: np.ndarray) -> float | None:
    """Chance that a right answer, of gold score at least 0.5, scores above a wrong one; equal scores count half.

    The area under the ROC curve, by ranks (Mann and Whitney, 1947). None where all answers are right or all wrong;
    those whose score is NaN are left out.
    """
    ranked_A = ~np.isnan(scores_A)
    right_A = golds_A[ranked_A] >= 0.5
    num_right, num_wrong = int(right_A.sum()), int((~right_A).sum())
    if not num_right or not num_wrong:
        return None
    ranks_A = ranks(scores_A[ranked_A], np.ones(len(right_A)))
    return float((ranks_A[right_A].sum() - num_right**2 / 2) / (num_right * num_wrong))


def repetition(tokens: np.ndarray) -> float:
    """Share of an answer's NGRAM-token phrases that occurred in it before; 0 for an answer shorter than one."""
    phrases = [tuple(tokens[start : start + NGRAM].tolist()) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(phrases)) / len(phrases) if phrases else 0.0


def _token_sums(rollout: Rollout, experience: Experience, further: TokenFigures) -> dict[str, float]:
    """Sums over the tokens of one row, and their number; added up over rows and ranks."""
    old_N, reference_N = experience.old_N, experience.reference_N
    figures: dict[str, torch.Tensor] = {}
    if reference_N is not None:
        figures |= {
            # k1 is negative on some tokens and may cancel to about 0; k3 never is, and shows that.
            "kl": kl_estimate(old_N, reference_N, "k1"),
            "kl_k3": kl_estimate(old_N, reference_N, "k3"),
        }
    figures |= {
        "entropy": experience.entropies_N,
        "generator_gap": (old_N - sampled_logprobs(rollout, experience)).abs(),
        **further(experience),
    }
    sums: list[float] = torch.stack(
        [figure_N.double().sum() for figure_N in figures.values()]
    ).tolist()  # one wait for the device
    return {"tokens": float(len(old_N)), **dict(zip(figures, sums, strict=True))}


def _by_condition(name: str, rollout: Rollout, values_A: np.ndarray) -> dict[str, float]:
    """Means over the answers to the prompts of each condition; empty where prompts have none."""
    return {
        f"{name}/{condition}": float(values_A[inside_A].mean())
        for condition, inside_A in _conditions(rollout).items()
    }


def _conditions(rollout: Rollout) -> dict[str, np.ndarray]:
    """Mask of the answers under each condition, bool [A], by name in alphabetical order."""
    conditions = [prompt.condition for prompt in rollout.prompts]
    return {
        condition: np.array([other == condition for other in conditions])
        for condition in sorted({condition for condition in conditions if condition is not None})
    }


def _length_ranks(rollout: Rollout, scores_A: np.ndarray) -> dict[str, float | None]:
    """Rank correlation of score and length, over all answers and under each condition."""
    name, lengths_A = "score_length_rank_correlation", rollout.answer_lengths
    return {
        name: spearman(scores_A, lengths_A),
        **{
            f"{name}/{condition}": spearman(scores_A[inside_A], lengths_A[inside_A])
            for condition, inside_A in _conditions(rollout).items()
        },
    }
