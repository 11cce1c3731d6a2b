"""Steps and passes of a DPO run."""

from __future__ import annotations

from tuner.config import DPO
from tuner.errors import UserError
from tuner.models.adapters import trains_rows_of_head
from tuner.models.load import Loaded
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


def check_head(loaded: Loaded) -> None:
    """UserError where an adapter trains single rows of the head: TRL computes the loss from its plain matrix."""
    if trains_rows_of_head(loaded.model):
        raise UserError(
            "TRL's DPO cannot train an adapter that trains single rows of the head (model.resize_embeddings, "
            "trainable_token_indices): write adapter=null, or train the new tokens by SFT first, and name its merged "
            "folder"
        )
