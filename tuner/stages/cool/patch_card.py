"""What a patch did to a reward model: how it ranks the original rows and the labels held out, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from tuner.config import Model, Patch, RewardModel, override
from tuner.evaluation.report_card.card import Ranking, ReportCard
from tuner.models.load import load_model
from tuner.models.reward_record import Reference
from tuner.models.roles import Roles
from tuner.stages.finished_model import free_memory
from tuner.stages.reward.evaluate import make_report
from tuner.training.devices import Devices

ALL = "all rows"
"""Name of the group of all original rows, beside those of conditions."""


@dataclass(frozen=True)
class PatchCard:
    """A reward model on the original held-out rows, and on the labels that no round trains on."""

    original: Mapping[str, Ranking]
    """ALL and each condition -> its rows; empty where no original row is held out."""
    patterns: Mapping[str, Ranking]
    """Pattern -> its labels."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`."""
        parts = (values["original"], values["patterns"])
        return cls(*({name: Ranking(**group) for name, group in part.items()} for part in parts))

    @property
    def labels_right(self) -> float:
        """Share of the held-out labels that are ranked as they say; 0 without any."""
        rows = sum(group.rows for group in self.patterns.values())
        return sum(group.accuracy * group.rows for group in self.patterns.values()) / max(rows, 1)


def patch_card(
    model: Model, reward: RewardModel, held_out: Mapping[str, str]
) -> tuple[PatchCard, Reference | None]:
    """Measure a reward model on the test rows of `reward`, and on files of held-out labels by their pattern.

    Also returns the distribution of its scores on the test rows, if there are any. All ranks call it together.
    """
    devices = Devices.unsharded(reward)
    loaded = load_model(model, precision=reward.precision, device=devices.device, train=False, head="score")
    roles = Roles.of("reward", loaded, devices.autocast)
    original = make_report(reward, roles, devices, controls=())
    labels = None
    if held_out:
        test = override(
            reward,
            {"data.test_files": list(held_out.values()), "data.split.test": 0.0, "evaluation.rows": None},
        )
        labels = make_report(test, roles, devices, controls=())
    del loaded, roles
    free_memory()
    card = PatchCard(
        {} if original is None else _original_groups(original.card),
        {} if labels is None else _pattern_groups(labels.card, held_out),
    )
    return card, None if original is None else original.reference


def costs(before: PatchCard, after: PatchCard, patch: Patch) -> list[str]:
    """Sentences on what a patch costs beyond its limits."""
    sentences: list[str] = []
    if ALL in before.original:
        loss = before.original[ALL].accuracy - after.original[ALL].accuracy
        if loss > patch.max_accuracy_loss:
            sentences.append(
                f"accuracy on the original held-out rows falls from {before.original[ALL].accuracy:.3f} to "
                f"{after.original[ALL].accuracy:.3f}, by more than max_accuracy_loss={patch.max_accuracy_loss:g}"
            )
    for name, group in before.original.items():
        margin = after.original[name].margin
        if patch.min_margin is not None and group.margin > 0 and margin < patch.min_margin * group.margin:
            sentences.append(
                f"the mean margin of {name} falls from {group.margin:.2f} to {margin:.2f}, below "
                f"min_margin={patch.min_margin:g} of it"
            )
    return sentences


def _original_groups(card: ReportCard) -> dict[str, Ranking]:
    groups = {group.name: Ranking.of(group) for group in card.conditions}
    return groups if card.overall is None else {ALL: Ranking.of(card.overall), **groups}


def _pattern_groups(card: ReportCard, held_out: Mapping[str, str]) -> dict[str, Ranking]:
    by_file = {group.name: Ranking.of(group) for group in card.sources}
    return {pattern: by_file[file] for pattern, file in held_out.items() if file in by_file}
