"""Averages of a reward model's weights before and after a patch (WARM, arXiv 2401.12187)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tuner.config import Model, RewardModel
from tuner.errors import UserError
from tuner.models.load import Loaded, load_model
from tuner.models.reward_record import Reference, write_reward_record
from tuner.stages.finished_model import free_memory
from tuner.stages.reward.finish import make_record, write_reward_model


def write_average(before: Model, after: Model, share: float, reward: RewardModel, folder: Path) -> None:
    """Write the reward model whose trained weights are (1 - share) * before + share * after.

    Raises UserError where the two models are not of the same weights.
    """
    patched, start = _load(after, reward), _load(before, reward)
    weights = dict(start.model.named_parameters())
    with torch.no_grad():
        for name, weight in patched.model.named_parameters():
            if weight.requires_grad:
                if name not in weights or weights[name].shape != weight.shape:
                    raise UserError(
                        f"{after.path}: has other weights than {before.path}, so that they cannot be averaged: leave "
                        "patch.average out"
                    )
                weight.lerp_(weights[name].to(weight), 1 - share)
    del start, weights
    write_reward_model(reward, patched, folder)
    del patched
    free_memory()


def write_scores(folder: Path, reward: RewardModel, reference: Reference | None) -> None:
    """Record how an average scores held-out answers, without which it could be no part of an ensemble."""
    write_reward_record(folder, replace(make_record(reward, None), reference=reference))


def _load(model: Model, reward: RewardModel) -> Loaded:
    """A reward model on the CPU, its trained weights in fp32; a complete one is not quantized to be averaged."""
    model = model.model_copy(update={"quantization": None})
    return load_model(model, precision=reward.precision, device=torch.device("cpu"), head="score")
