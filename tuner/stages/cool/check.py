"""Dry run of a run in rounds: its policy and its reward model, as each is checked alone, and how they fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tuner.config import COOL, People
from tuner.errors import UserError
from tuner.feedback.labelers import labeler_of
from tuner.models.locate import locate
from tuner.models.memory import MemoryPlan
from tuner.models.reward_record import known_conditions
from tuner.stages.check import CheckReport
from tuner.stages.memory_savings import Saving
from tuner.stages.registry import stage_of


def check_rounds(config: COOL, stand_ins: frozenset[str]) -> CheckReport:
    """The dry run; see Stage.check. The steps are those of all policies; the memory is that of the largest part."""
    for feedback in config.feedback:
        if not isinstance(feedback, People):
            labeler_of(feedback)
    _check_conditions(config, stand_ins)
    policy = _check_part(config, "policy", stand_ins)
    reward = _check_part(config, "reward", stand_ins)
    steps = sum(settings.steps or policy.steps for settings in config.rounds)
    steps = min(steps, config.max_steps or steps)
    return replace(
        policy,
        data=f"{policy.data}; of the reward model: {reward.data}",
        steps=steps,
        tokens=round(policy.tokens * steps / max(policy.steps, 1)),
        peak_gib=max(policy.peak_gib, reward.peak_gib),
        memory=MemoryPlan.largest(policy.memory, reward.memory),
        savings=_savings(policy, reward),
        warnings=(*policy.warnings, *reward.warnings),
        notes=(*policy.notes, *(f"reward model: {note}" for note in reward.notes)),
    )


def _savings(policy: CheckReport, reward: CheckReport) -> tuple[Saving, ...]:
    """Of the part that needs more: as long as the other needs less."""
    parts = {"policy": policy, "reward": reward}
    larger, smaller = sorted(parts, key=lambda name: -parts[name].peak_gib)
    least, most = parts[smaller].peak_gib, parts[larger].peak_gib
    return tuple(
        Saving(f"{larger}.{saving.setting}", most - max(saving.peak_gib, least), max(saving.peak_gib, least))
        for saving in parts[larger].savings
        if most > least
    )


def _check_part(config: COOL, part: str, stand_ins: frozenset[str]) -> CheckReport:
    of_part = {field.removeprefix(f"{part}.") for field in stand_ins if field.startswith(f"{part}.")}
    part_config = getattr(config, part)
    return stage_of(part_config).check(part_config, frozenset(of_part))


def _check_conditions(config: COOL, stand_ins: frozenset[str]) -> None:
    """Raise UserError where the first reward model knows other conditions than the patches would teach."""
    model = config.policy.reward_model
    assert model is not None
    if "policy.reward" in stand_ins or not Path(model.path).is_dir():
        return
    known, patched = known_conditions(locate(model, weights=False).folder), list(config.reward.conditions)
    if sorted(known) != sorted(patched):
        raise UserError(
            f"policy.reward {model.path}: knows the conditions {', '.join(known) or 'none'}, and reward.conditions "
            f"names {', '.join(patched) or 'none'}; patches would change what it knows: write the same"
        )
