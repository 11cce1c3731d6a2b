"""Steps and passes of a DPO run."""

from __future__ import annotations

from tuner.config import DPO
from tuner.training.pair_plan import PairPlan


def plan_pairs(config: DPO, pairs: int, processes: int = 1) -> PairPlan:
    """The plan of a run over so many pairs, on so many processes."""
    return PairPlan(
        pairs=pairs,
        pairs_per_step=config.pairs_per_step,
        pairs_per_pass=config.pairs_per_pass,
        epochs=config.epochs,
        max_steps=config.max_steps,
        processes=processes,
    )
