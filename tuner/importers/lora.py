"""LoRA settings, which all trainers take from peft's LoraConfig under names of their own."""

from __future__ import annotations

import math
import re

from tuner.importers.keys import Keys
from tuner.importers.part import Part
from tuner.importers.recipe import Recipe


def lora_part(keys: Keys, recipe: Recipe, names: dict[str, str], rank: int, alpha: float | None) -> Part:
    """The adapter of these keys.

    names: r, alpha, dropout, ... -> the trainer's keys; rank, alpha: its defaults, None: 2 × rank.
    """
    r = keys.integer(names["r"], rank) or rank
    scale = keys.number(names["alpha"], alpha) or 2.0 * r
    if keys.boolean(names.get("rslora", "use_rslora")):
        scale *= math.sqrt(r)
        recipe.decide(
            "adapter.alpha",
            "rank-stabilized LoRA: times sqrt(r), as the update is multiplied by alpha / r here",
        )
    if keys.boolean(names.get("dora", "use_dora")):
        keys.lose(names.get("dora", "use_dora"), "there is no DoRA here; the adapter is plain LoRA")
    part = Part("LoRA", r=r, alpha=round(scale, 6), dropout=keys.number(names["dropout"], 0.0))
    targets_key = names.get("targets", "target_modules")
    targets = keys.texts(targets_key)
    if targets and targets not in (["all"], ["all-linear"], ["all_linear"]):
        if all(re.fullmatch(r"[\w.]+", target) for target in targets):
            part["targets"] = tuple(targets)
        else:
            keys.lose(
                targets_key, "patterns of module names cannot be carried: write suffixes as adapter.targets"
            )
    whole = keys.texts(names.get("whole", "modules_to_save"))
    part["train_whole"] = tuple(whole) or None
    return part
