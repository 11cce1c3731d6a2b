"""What a rollout looks like in numbers: what every step logs, the same on every rank.

Shapes: A answers of the rollout, N answer tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tuner.losses.moments import MomentSums
from tuner.losses.policy import explained_variance, kl_estimate
from tuner.rollout.experience import Experience
from tuner.rollout.rollout import Rollout
from tuner.training.devices import Devices, added

NGRAM = 4
"""Tokens of a phrase whose coming back counts as repetition."""


def health(
    rollout: Rollout, scores_A: np.ndarray, experiences: Sequence[Experience], devices: Devices
) -> dict[str, float | None]:
    """The record's figures of the answers, their scores, and what policy, reference and critic say of them."""
    sums = devices.sum(added([_sums(rollout, one) for one in experiences]))
    returns, residuals = (
        MomentSums(sums["tokens"], sums[name], sums[f"{name}_squares"]) for name in ("returns", "residuals")
    )
    rewards_A = _rewards(len(rollout), experiences, devices)
    return {
        "score": float(scores_A.mean()),
        "reward": float(rewards_A.mean()),
        **_by_condition("score", rollout, scores_A),
        **_by_condition("reward", rollout, rewards_A),
        **{
            name: sums[name] / sums["tokens"] for name in ("kl", "kl_k3", "entropy", "value", "generator_gap")
        },
        "explained_variance": explained_variance(returns, residuals),
        "length": float(rollout.answer_lengths.mean()),
        "ended": float(rollout.ended.mean()),
        "repetition": float(np.mean([repetition(answer.tokens) for answer in rollout.answers])),
        "prompts": len(rollout),
    }


def repetition(tokens: np.ndarray) -> float:
    """Share of an answer's phrases of NGRAM tokens that occurred in it before; 0 for one too short to have any."""
    phrases = [tuple(tokens[start : start + NGRAM].tolist()) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(phrases)) / len(phrases) if phrases else 0.0


def _sums(rollout: Rollout, one: Experience) -> dict[str, float]:
    """Of one row, to be added up over rows and ranks."""
    drawn = np.concatenate([rollout.answers[index].logprobs for index in one.row.answers.tolist()])
    gap_N = one.old_N - torch.from_numpy(drawn).to(one.old_N)
    residuals_N = one.returns_N - one.values_N
    of_tokens = {
        "kl": kl_estimate(one.old_N, one.reference_N, "k1"),
        "kl_k3": kl_estimate(one.old_N, one.reference_N, "k3"),
        "entropy": one.entropies_N,
        "value": one.values_N,
        "generator_gap": gap_N.abs(),
        "returns": one.returns_N,
        "returns_squares": one.returns_N.double().square(),
        "residuals": residuals_N,
        "residuals_squares": residuals_N.double().square(),
    }
    sums = torch.stack([value_N.double().sum() for value_N in of_tokens.values()]).tolist()  # one wait
    return {"tokens": float(len(one.old_N)), **dict(zip(of_tokens, sums, strict=True))}


def _rewards(count: int, experiences: Sequence[Experience], devices: Devices) -> np.ndarray:
    """Summed rewards of each answer, float64 [A]."""
    own = []
    for one in experiences:
        cumulated = np.concatenate([[0.0], one.rewards_N.double().cpu().numpy().cumsum()])
        own += zip(one.row.answers.tolist(), np.diff(cumulated[list(one.row.borders)]).tolist(), strict=True)
    rewards_A = np.zeros(count)
    for answer, reward in devices.gather(own):
        rewards_A[answer] = reward
    return rewards_A


def _by_condition(name: str, rollout: Rollout, values_A: np.ndarray) -> dict[str, float]:
    """Means of the answers to the prompts of each condition; empty where prompts have none."""
    conditions = [prompt.condition for prompt in rollout.prompts]
    return {
        f"{name}/{one}": float(values_A[[condition == one for condition in conditions]].mean())
        for one in sorted({condition for condition in conditions if condition is not None})
    }
