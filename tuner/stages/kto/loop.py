"""Kahneman-Tversky optimization (arXiv 2402.01306): a thin stage on TRL's KTOTrainer."""

from __future__ import annotations

from functools import partial

from tuner.config import KTO
from tuner.stages.context import Context
from tuner.stages.kto.plan import plan_answers
from tuner.stages.kto.trainer import make_dataset, make_trainer
from tuner.stages.trl_run import train_with_trl


def kto(config: KTO, context: Context) -> None:
    """Train the policy towards desirable answers and away from others, each against the KL from the reference.

    `desirable_reward` and `undesirable_reward` are beta times how much log-probability these answers have gained since
    the start, `margin` is their difference. Before the first step all are 0, and the loss is half the mean weight.
    """
    train_with_trl(
        config,
        context,
        lambda labels, suffix: make_dataset(config, labels, suffix),
        lambda loaded, rows: make_trainer(config, loaded, rows, context.run, context.devices),
        partial(plan_answers, config),
    )
