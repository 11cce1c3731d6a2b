"""The rounds of a run: their folders, the configs of their runs, and how many steps each has.

    runs/NAME/round_2/reward/       the patched reward model: an ordinary run
                     /ppo/          the policy: an ordinary run, in a folder named by its algorithm
                     /candidates/   pairs of answers, and the patterns that were looked for
                     /feedback/     their labels

What is finished of these is the whole state of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tuner.config import COOL, GRPO, PPO, RLOO, Model, Round, override
from tuner.feedback.round_folders import LabelFiles, round_files, round_folder
from tuner.stages.run import Run

LEAST_RECORDED = 64
"""Answers of each rollout that a policy records at least: patterns are looked for in them."""


@dataclass(frozen=True)
class RoundPlace:
    """A round of a run and where it is kept."""

    run: Path
    """The folder of the whole run."""
    number: int
    """From 1."""
    settings: Round
    algorithm: str

    @property
    def folder(self) -> Path:
        return round_folder(self.run, self.number)

    @property
    def reward(self) -> Run:
        """The run of the patched reward model; a round that patches nothing has none."""
        return Run(self.folder / "reward")

    @property
    def policy(self) -> Run:
        return Run(self.folder / self.algorithm)

    @cached_property
    def recorded(self) -> Mapping[int, Sequence[dict[str, Any]]]:
        """See `RunFolder.answers`, of the trained policy: the largest file of a run, which is read once."""
        return self.policy.answers

    @property
    def label_files(self) -> LabelFiles:
        return round_files(self.run, self.number)

    @property
    def candidates(self) -> Path:
        return self.label_files.candidates

    @property
    def patterns(self) -> Path:
        return self.candidates.with_name("patterns.json")

    @property
    def labels(self) -> Path:
        return self.label_files.store

    def name(self, part: str) -> str:
        """Name of the run of a part, which trackers show."""
        return f"{self.run.name}.round_{self.number}.{part}"


def rounds_of(config: COOL, folder: Path) -> list[RoundPlace]:
    """All rounds of a config, in order."""
    return [
        RoundPlace(folder, number, settings, config.policy.stage)
        for number, settings in enumerate(config.rounds, 1)
    ]


def trained_rounds(config: COOL, folder: Path) -> Iterator[RoundPlace]:
    """The rounds whose policy has been trained."""
    return (place for place in rounds_of(config, folder) if place.policy.is_finished)


def steps_left(config: COOL, place: RoundPlace) -> int | None:
    """Steps that the policies of this and later rounds may take; None: without a limit."""
    if config.max_steps is None:
        return None
    earlier = rounds_of(config, place.run)[: place.number - 1]
    return config.max_steps - sum(len(round_.policy.metrics) for round_ in earlier)


def policy_config(config: COOL, place: RoundPlace, reward: Model, previous: str | None) -> PPO | GRPO | RLOO:
    """The config of a round's policy. reward: its reward model. previous: path of the policy of the round before."""
    policy = config.policy
    limits = [
        steps for steps in (place.settings.steps or policy.max_steps, steps_left(config, place)) if steps
    ]
    recorded = policy.evaluation.recorded_answers
    changes: dict[str, Any] = {
        **_shared_changes(config, place, policy.stage, policy.seed),
        "reward": reward,
        "max_steps": min(limits, default=None),
        "evaluation.recorded_answers": recorded if recorded is None else max(recorded, LEAST_RECORDED),
    }
    if place.settings.start == "continue" and previous is not None:
        # Of the policy before all rounds: measured from the last round's, KL would forget how far that one had come.
        reference = policy.reference or policy.policy
        changes |= {"policy.path": previous, "policy.revision": None, "reference": reference}
    return override(policy, changes)


def shared_reward_changes(config: COOL, place: RoundPlace) -> dict[str, Any]:
    """Changes of `reward` for the run of a round's patch, apart from what it starts from and its rows."""
    changes = _shared_changes(config, place, "reward", config.reward.seed)
    return {**changes, "checkpoint": config.checkpoint.model_copy(update={"milestones": {}})}


def _shared_changes(config: COOL, place: RoundPlace, part: str, seed: int) -> dict[str, Any]:
    tracking = config.tracking
    if tracking is not None:
        group = tracking.group or config.name
        job_type = f"{place.folder.name}.{part}"
        changes = {"group": group, "job_type": job_type, "tags": (*tracking.tags, part)}
        tracking = tracking.model_copy(update=changes)
    return {
        "name": place.name(part),
        "seed": seed + config.seed,
        "checkpoint": config.checkpoint,
        "tracking": tracking,
    }
