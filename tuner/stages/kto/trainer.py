"""TRL's KTOTrainer in a run folder: its dataset, settings and measures."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from tuner.config import KTO
from tuner.data.labels import Labels
from tuner.data.load_labels import labeled_answers
from tuner.errors import UserError
from tuner.models.folder_files import first_line
from tuner.models.load import Loaded
from tuner.stages.kto.plan import in_order, plan_answers
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
from trl import KTOConfig, KTOTrainer  # pyright: ignore[reportPrivateImportUsage]  (lazy, in TRL)
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

REWARDS = {"desirable_reward": "rewards/chosen", "undesirable_reward": "rewards/rejected"}
"""Rewards of both kinds of answers -> TRL's names for them."""


class Trainer(RunTrainer, KTOTrainer):
    """KTO in a run folder."""

    measures = {"loss": "loss", "kl": "kl"}  # noqa: RUF012 (a constant)
    recorded = measures
    recorded_at_times = REWARDS | {"margin": "rewards/margins"}
    reference_columns = ("ref_logps", "ref_KL_logps")

    def measure(self, rows: Dataset | None) -> dict[str, float]:
        """Means over the rows, in which every row counts once: loss, KL, the rewards of both kinds, and their margin.

        Desirable answers are measured apart from the others: TRL's mean reward of one kind is over the passes that
        hold any, each of equal weight.
        """
        if rows is None:
            return {}
        labels = np.array(rows["label"])
        means, weighted = dict[str, float](), dict.fromkeys(self.measures, 0.0)
        for is_desirable, (name, key) in zip((True, False), REWARDS.items(), strict=True):
            indices = np.flatnonzero(labels == is_desirable)
            if len(indices):
                measured = self.means(rows.select(indices), {**self.measures, name: key})
                means[name] = measured[name]
                for shared in weighted:
                    weighted[shared] += measured[shared] * len(indices) / len(labels)
        if len(means) == len(REWARDS):
            means["margin"] = means["desirable_reward"] - means["undesirable_reward"]
        return {**weighted, **means}


def make_dataset(config: KTO, labels: Labels, suffix: np.ndarray) -> Dataset:
    """Labeled answers in TRL's columns, in the order of training.

    KL_completion_ids: the answer to another prompt of the same pass, from which KL is estimated; cut where it would be
    longer than max_length behind this prompt.
    """
    rows = list(labeled_answers(in_order(config, labels), suffix))
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in LABELED_COLUMNS}
    if config.loss == "kto":
        size = config.answers_per_pass
        passes = (rows[start : start + size] for start in range(0, len(rows), size))
        others = [other for part in passes for other in (part[-1], *part[:-1])]
        for name in ("completion_ids", "completion_learned"):
            columns[f"KL_{name}"] = [
                other[name][: config.data.max_length - len(row["prompt_ids"])]
                for row, other in zip(rows, others, strict=True)
            ]
    return Dataset.from_dict(columns)


LABELED_COLUMNS = ("prompt_ids", "completion_ids", "completion_learned", "label")


@without_deprecations()
def make_trainer(config: KTO, loaded: Loaded, answers: Dataset, run: Run, devices: Devices) -> Trainer:
    """TRL's trainer over the model's trained weights. Raises UserError where TRL refuses.

    The reference is the starting point.
    """
    collator = DataCollatorForUnpairedPreference(padding_token(loaded))
    learned = {f"{part}completion_mask": (f"{part}completion_learned",) for part in ("", "KL_")}
    try:
        return Trainer(
            **trained_model_arguments(config, loaded, run, devices),
            args=KTOConfig(
                **common_arguments(config, plan_answers(config, len(answers), devices.world), run, devices),
                beta=config.beta,
                loss_type=config.loss,
                desirable_weight=config.desirable_weight,
                undesirable_weight=config.undesirable_weight,
                precompute_ref_log_probs=config.precompute_reference,
            ),
            train_dataset=answers,
            data_collator=LearnedTokens(collator, learned),
        )
    except ValueError as error:  # for example an adapter on the head
        raise UserError(f"{config.name}: TRL's KTO cannot train this ({first_line(error)})") from error
