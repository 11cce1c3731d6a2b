"""A run in rounds in W&B: a run of its own beside those of its parts, with a row for each round, and all in a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuner.config import COOL
from tuner.stages.context import Context
from tuner.stages.cool.patch_card import ALL, PatchCard
from tuner.stages.cool.results import results_of
from tuner.stages.cool.rounds import RoundPlace, trained_rounds
from tuner.training.figures import Charts, Picture, StageFigures
from tuner.training.wandb_tracker import WandbTracker
from tuner.training.watchers import Watchers

JOB = "rounds"
"""W&B's job type of the whole run; those of its parts are round_1.ppo, round_2.reward, ..."""
FIGURES = StageFigures(
    (), Charts("round", groups={}, rules={"patch_": "patch/"}, summaries={}), (), Picture((), ())
)


def track_round(config: COOL, context: Context, place: RoundPlace) -> None:
    """Log the rounds so far, unless a round's pairs are being labeled already, so that it was logged before."""
    if config.tracking is not None and context.devices.is_main and not place.labels.is_file():
        track_rounds(config, context, results_of(list(trained_rounds(config, place.run)))["rounds"])


def track_rounds(config: COOL, context: Context, rounds: Sequence[Mapping[str, Any]]) -> None:
    """Log what each of some rounds came to. rounds: their results.

    The run is open in W&B for this moment only, since those of its parts are in between. It goes on under its id: W&B
    passes over rows that it has.
    """
    if config.tracking is None or not context.devices.is_main:
        return
    changes = {"group": config.tracking.group or config.name, "job_type": JOB, "x_axis": "step"}
    watcher = Watchers([WandbTracker(config.tracking.model_copy(update=changes), FIGURES)])
    watcher.begin(context.run.folder, config, 0, len(config.rounds))
    rows = [dict(_figures(results)) for results in rounds]
    for row in rows:
        watcher.step(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    watcher.report({"rounds": (columns, [[row.get(name) for name in columns] for row in rows])})
    # A run that waits for its next round is shown as preempted, which can go on.
    watcher.end("finished" if len(rounds) == len(config.rounds) else "interrupted")


def _figures(results: Mapping[str, Any]) -> Iterator[tuple[str, float | int | None]]:
    """Name and value of the numbers that are shown of a round."""
    yield "step", results["round"]
    yield "policy_steps", results["steps"]
    for measure in ("gold", "score"):
        if measure in results:
            yield f"{measure}_before", results[measure]["before"]
            yield measure, results[measure]["after"]
    yield "kl", results.get("kl")
    yield "pattern_share", max(results["hack"].values(), default=None)
    if (patch := results["patch"]) is not None:
        yield "patch_labels", patch["labels"]
        for when in ("before", "after"):
            card = PatchCard.from_dict(patch[when])
            yield f"patch_labels_right_{when}", card.labels_right
            if ALL in card.original:
                yield f"patch_accuracy_{when}", card.original[ALL].accuracy
