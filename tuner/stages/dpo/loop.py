"""Direct preference optimization (arXiv 2305.18290): a thin stage on TRL's DPOTrainer."""

from __future__ import annotations

from functools import partial

from tuner.config import DPO
from tuner.data.load_pairs import pairs
from tuner.stages.context import Context
from tuner.stages.dpo.plan import plan_pairs
from tuner.stages.dpo.trainer import make_dataset, make_trainer
from tuner.stages.trl_run import train_with_trl


def dpo(config: DPO, context: Context) -> None:
    """Train the policy to prefer the rows' better answers, with a penalty on its distance from the reference.

    `margin` is beta times how much more log-probability the better answer has gained than the worse one since the
    start; `accuracy` is the share of pairs where it is positive. Before the first step both are 0, and the loss of
    "sigmoid" is log 2.
    """
    train_with_trl(
        config,
        context,
        lambda comparisons, suffix: make_dataset(pairs(comparisons, suffix)),
        lambda loaded, rows: make_trainer(config, loaded, rows, context.run, context.devices),
        partial(plan_pairs, config),
    )
