"""What may change in a config when a run resumes, and what binds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.config import StageConfig, differences

FREE_ON_RESUME = (
    "name",
    "tracking",
    "checkpoint.",
    "data.cache",
    "prompts.cache",
    "replay.cache",
    "tokens_per_pass",
    "sampling.cache_gib",
    "gradient_checkpointing",
    "memory",
    "parallel.",
    "device",
    "engine.",
)
"""Config paths that may differ when a run resumes: they do not change the result (the last seven: but for
rounding), and whoever ran out of memory needs them. A folder may be renamed. The bound of an engine's gap changes the
loss; a run that stopped at it must be able to go on."""


LENGTH = ("max_steps", "epochs")
"""Config paths that say how long a run is, beside further rounds: a run may be made longer, and never shorter."""
ROUNDS = "rounds."
"""Start of the paths in a run's rounds, which are counted from 0."""
FREE_OF_A_ROUND = ("patch.on_loss",)
"""Paths in a round that has begun which may differ: what follows a patch that was refused."""


def reach_sentences(max_steps: int | None, planned: int, epochs: float) -> list[str]:
    """A sentence where a run never reaches its max_steps. planned: the steps that its epochs are."""
    if max_steps is None or max_steps <= planned:
        return []
    return [
        f"max_steps={max_steps:,} is not reached: the rows give {planned:,} steps in {epochs:g} epochs, where the run "
        "and its schedule end; more epochs make it longer"
    ]


def changes_that_bind(
    old: StageConfig, new: StageConfig, rounds_begun: int = 0
) -> list[tuple[str, Any, Any]]:
    """(path, old, new) of the leaves in which two configs differ and a resumed run may not.

    rounds_begun: of a run in rounds; those that have not begun are planned anew.
    """
    free = (*FREE_ON_RESUME, *(path for path, *_ in extension(old, new)))
    return [
        change
        for change in differences(old, new)
        if not change[0].startswith(free) and not _is_open(change[0], rounds_begun)
    ]


def _is_open(path: str, rounds_begun: int) -> bool:
    """Whether a path is of a round, and free there."""
    if not path.startswith(ROUNDS):
        return False
    number, _, field = path.removeprefix(ROUNDS).partition(".")
    return int(number) >= rounds_begun or field in FREE_OF_A_ROUND


def extension(old: StageConfig, new: StageConfig) -> list[tuple[str, Any, Any]]:
    """(path, old, new) of the limits by which the new config's run is longer; none where any is lower."""
    changes = [
        change for change in differences(old, new) if change[0] in LENGTH or _is_whole_round(change[0])
    ]
    return changes if all(_is_longer(*change) for change in changes) else []


def _is_whole_round(path: str) -> bool:
    return path.startswith(ROUNDS) and "." not in path.removeprefix(ROUNDS)


def _is_longer(path: str, before: Any, after: Any) -> bool:
    """Whether a limit is above another, None being none, or a round is a further one."""
    if path.startswith(ROUNDS):
        return before is None
    return after is None or (before is not None and after > before)


def extension_sentences(
    changes: Sequence[tuple[str, Any, Any]],
    record: Mapping[str, Any],
    *,
    total_steps: int,
    rates: Mapping[str, float | None],
    epoch: float,
) -> list[str]:
    """What the user must know of a run that was made longer.

    record: of its last step before. rates: learning rates of the next step, by their names in a record. epoch: at the
    end of the last step before, in the longer run's plan.
    """
    step = record["step"]
    limits = ", ".join(f"{path} was {before} and is now {after}" for path, before, after in changes)
    if step >= total_steps:
        return [f"{limits}: the run is no longer for it, as other limits end it after step {step:,}"]
    jumps = ", ".join(
        f"{name} {record.get(name) or 0:.2e} -> {rate or 0:.2e}" for name, rate in rates.items()
    )
    sentences = [
        f"{limits}: going on after step {step:,}. From here on the learning rate is that of a run of {total_steps:,} "
        f"steps from its start: {jumps}"
    ]
    if (skipped := epoch - record["epoch"]) > 1e-9:
        sentences.append(
            f"the shorter run ended in the middle of what is step {step:,} of the longer one: up to {skipped:.2%} of "
            "the rows are left out of this epoch"
        )
    return sentences
