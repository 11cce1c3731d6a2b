"""Steps and passes of a KTO run, and the order of its rows."""

from __future__ import annotations

import numpy as np

from tuner.config import KTO
from tuner.data.labels import Labels
from tuner.training.pair_plan import PairPlan


def plan_answers(config: KTO, answers: int, processes: int = 1) -> PairPlan:
    """The plan of a run over so many answers, on so many processes."""
    return PairPlan(
        pairs=answers,
        pairs_per_step=config.answers_per_step,
        pairs_per_pass=config.answers_per_pass,
        epochs=config.epochs,
        max_steps=config.max_steps,
        processes=processes,
        unit="answers",
    )


def in_order(config: KTO, labels: Labels) -> Labels:
    """The answers in the order of every epoch, a function of the seed.

    TRL does not shuffle: KL is estimated from answers that stand in the same pass.
    """
    return labels.take(np.random.default_rng(config.seed).permutation(len(labels)))
