"""TRL's DPOTrainer in a run folder: its dataset, settings and measures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from tuner.config import DPO
from tuner.data.load_pairs import Pair
from tuner.errors import UserError
from tuner.models.folder_files import first_line
from tuner.models.load import Loaded
from tuner.stages.dpo.plan import plan_pairs
from tuner.stages.run import Run
from tuner.training.devices import Devices
from tuner.training.trl_trainer import (
    LearnedTokens,
    RunTrainer,
    common_arguments,
    padding_token,
    trained_model_arguments,
    without_deprecations,
)

# isort: split
# after our door to TRL, which imports bitsandbytes without its advice
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]  (lazy, in TRL)
from trl.trainer.dpo_trainer import DataCollatorForPreference

MEASURES = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
"""Measures of held-out pairs -> TRL's names for them."""


class Trainer(RunTrainer, DPOTrainer):
    """DPO in a run folder."""

    measures = MEASURES
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")
    recorded = MEASURES | {"chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected"}


def make_dataset(pairs: Iterable[Pair]) -> Dataset:
    """Pairs of tokens in TRL's columns, and the answers' learned tokens."""
    columns: dict[str, list[Any]] = {}
    for pair in pairs:
        for name, values in pair.items():
            columns.setdefault(name, []).append(values)
    return Dataset.from_dict(columns)


def weighted_losses(config: DPO) -> tuple[dict[str, float], float]:
    """TRL's losses by name with their weights, and the label smoothing of its "robust".

    TRL has no conservative DPO, −(1 − e) log σ(d) − e log σ(−d) = −log σ(d) + e d, with d = beta times the margin; but
    its "robust" at a smoothing of 1/4 is −log σ(d) − d / 2, and 1 + 2 e of "sigmoid" minus 2 e of that is the same.
    """
    losses, smoothing = {config.loss: 1.0}, config.label_smoothing
    if config.loss == "sigmoid" and smoothing:
        losses, smoothing = {"sigmoid": 1 + 2 * smoothing, "robust": -2 * smoothing}, 0.25
    if config.nll_weight:
        losses["sft"] = config.nll_weight
    return losses, smoothing


@without_deprecations()
def make_trainer(config: DPO, loaded: Loaded, pairs: Dataset, run: Run, devices: Devices) -> Trainer:
    """TRL's trainer over the model's trained weights. Raises UserError where TRL refuses.

    The reference is the starting point.
    """
    losses, smoothing = weighted_losses(config)
    collator = DataCollatorForPreference(padding_token(loaded))
    try:
        return Trainer(
            **trained_model_arguments(config, loaded, run, devices),
            args=DPOConfig(
                **common_arguments(config, plan_pairs(config, len(pairs), devices.world), run, devices),
                beta=config.beta,
                loss_type=list(losses),
                loss_weights=list(losses.values()),
                label_smoothing=smoothing,
                ld_alpha=config.ld_alpha,
                precompute_ref_log_probs=config.precompute_reference,
            ),
            train_dataset=pairs,
            data_collator=LearnedTokens(
                collator, {"completion_mask": ("chosen_learned", "rejected_learned")}
            ),
        )
    except ValueError as error:  # for example an adapter on the head
        raise UserError(f"{config.name}: TRL's DPO cannot train this ({first_line(error)})") from error
