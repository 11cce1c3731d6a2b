"""The patch of a round: the reward model learns from all labels so far, and keeps what it knew, or is not taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.config import COOL, Model, RewardModel, override
from tuner.errors import UserError
from tuner.stages.context import Context
from tuner.stages.cool.averages import write_average, write_scores
from tuner.stages.cool.labels import labels_before
from tuner.stages.cool.patch_card import ALL, PatchCard, costs, patch_card
from tuner.stages.cool.patch_rows import PatchRows, read_patch_rows, write_patch_rows
from tuner.stages.cool.rounds import RoundPlace, rounds_of, shared_reward_changes
from tuner.stages.train import train_in

RECORD = "patch"
"""Name of the JSON file in the run of a patch that says what became of it."""


@dataclass(frozen=True)
class Patched:
    """A reward model that a patch could give."""

    path: str
    share: float
    """Of the patched weights in it."""
    card: PatchCard
    costs: list[str]
    """Sentences on limits that it exceeds."""


def patch_reward(config: COOL, context: Context, place: RoundPlace, previous: Model) -> Model:
    """Patch the reward model of the round before; returns this round's.

    Without labels it is the same one. What became of a patch is kept in its run's patch.json. Raises UserError where
    it costs more than the config allows, unless that is rolled back.
    """
    run = place.reward
    record = run.read_json(RECORD) if run.is_finished else None
    if record is None:
        rows = _rows(config, context, place)
        if rows is None:
            return previous
        context.say(
            f"round {place.number}: patching {previous.path} with {rows.labels:,} labels beside {rows.original:,} "
            f"original rows ({rows.left_out:,} pairs have no usable label)"
        )
        for pattern, count in rows.contradicting.items():
            what = f"the labels reject {pattern}: {count:,} original rows that prefer it are left out"
            context.say(f"round {place.number}: {what}")
        train_in(run, _run_config(config, place, previous, rows), within=True)
        record = _judge(config, context, place, previous, rows)
        if context.devices.is_main:
            run.save_json(RECORD, record)
        context.devices.wait()
    if record["model"] is None and place.settings.patch.on_loss == "stop":
        raise UserError(
            f"{run.folder}: the patch is refused: {'; '.join(record['costs'])}; train on more original rows "
            '(patch.original), lower patch.lr, allow it, or set patch.on_loss="roll_back", and remove this folder'
        )
    return model_of(config, place) or previous


def model_of(config: COOL, place: RoundPlace) -> Model | None:
    """The reward model that a round's patch gave, in the run's folder as it is named now; None without one."""
    record, folder = place.reward.read_json(RECORD) or {}, place.reward.folder
    if record.get("model") is None:
        return None
    return _patched_model(
        config, folder if record["share"] == 1 else _average_folder(folder, record["share"])
    )


def _patched_model(config: COOL, folder: Path) -> Model:
    """A reward model that patches gave, loaded as policies load the first one."""
    assert config.policy.reward_model is not None
    return config.policy.reward_model.model_copy(update={"path": str(folder), "revision": None})


def _average_folder(folder: Path, share: float) -> Path:
    return folder / f"average_{share:g}"


def _rows(config: COOL, context: Context, place: RoundPlace) -> PatchRows | None:
    """The rows of a patch: those its run has begun with, or all labels as they are now; None without any to train on.

    A round whose policy has begun is not patched any more: labels that came meanwhile are the next round's.
    """
    run, folder = place.reward, place.reward.folder / "rows"
    if not run.has_started and place.policy.has_started:
        return None
    if context.devices.is_main and not run.has_started:
        rounds = rounds_of(config, place.run)
        labels, patch = labels_before(place, rounds), place.settings.patch
        trained, held_out = labels.split(patch.held_out)
        if trained:
            write_patch_rows(labels, config.reward, patch, folder, config.seed + place.number)
        elif place.number > 1:
            besides = f" and is not held out (patch.held_out holds out {len(held_out):,})" if held_out else ""
            context.say(
                f"round {place.number}: no pair of an earlier round has a label that decides it{besides}, so the "
                "reward model stays as it is"
            )
    context.devices.wait()
    return read_patch_rows(folder) if folder.is_dir() else None


def _run_config(config: COOL, place: RoundPlace, previous: Model, rows: PatchRows) -> RewardModel:
    """The config of the run that patches."""
    reward, patch = config.reward, place.settings.patch
    changes: dict[str, Any] = {
        **shared_reward_changes(config, place),
        "data.files": rows.train,
        "data.test_files": [*reward.data.test_files, *rows.test.values()],
        "epochs": patch.epochs,
        "max_steps": patch.steps,
        "optimizer.lr": patch.lr or reward.optimizer.lr,
    }
    if patch.start == "continue":
        kept = ("path", "revision", "trust_remote_code")
        changes |= {f"model.{name}": getattr(previous, name) for name in kept}
    return override(reward, changes)


def _judge(
    config: COOL, context: Context, place: RoundPlace, previous: Model, rows: PatchRows
) -> dict[str, Any]:
    """Measure the model before and after the patch, and choose what the round takes."""
    patch, reward, folder = place.settings.patch, config.reward, place.reward.folder
    start = context.usable_model(previous)
    before, _ = patch_card(start, reward, rows.test)
    whole, choices = _patched_model(config, folder), list[Patched]()
    for share in (1.0, *patch.average):
        model = whole
        if share < 1:
            model = _patched_model(config, _average_folder(folder, share))
            if context.devices.is_main:
                write_average(start, whole, share, reward, Path(model.path))
            context.devices.wait()
        card, scores = patch_card(model, reward, rows.test)
        if share < 1 and context.devices.is_main:
            write_scores(Path(model.path), reward, scores)
        choices.append(Patched(model.path, share, card, costs(before, card, patch)))
    chosen = _best(choices)
    for sentence in _sentences(place, before, chosen):
        context.say(sentence)
    return _record(rows, previous.path, before, choices, chosen)


def _best(choices: list[Patched]) -> Patched:
    """Of those within the limits the one that ranks most held-out labels as they say; else the patched model."""
    within = [choice for choice in choices if not choice.costs]
    return max(within or choices[:1], key=lambda choice: (choice.card.labels_right, choice.share))


def _record(
    rows: PatchRows, previous: str, before: PatchCard, choices: list[Patched], chosen: Patched
) -> dict[str, Any]:
    return {
        "labels": rows.labels,
        "left_out": rows.left_out,
        "original": rows.original,
        "contradicting": rows.contradicting,
        "from": previous,
        "model": None if chosen.costs else chosen.path,
        "share": chosen.share,
        "costs": chosen.costs,
        "before": before.to_dict(),
        "after": chosen.card.to_dict(),
        "averages": {f"{choice.share:g}": choice.card.to_dict() for choice in choices[1:]},
    }


def _sentences(place: RoundPlace, before: PatchCard, chosen: Patched) -> list[str]:
    """What the patch did, for the console."""
    after, sentences = chosen.card, []
    groups: Mapping[str, Any] = {ALL: before.original.get(ALL), **before.patterns}
    for name, group in groups.items():
        now = after.original.get(name) if name == ALL else after.patterns[name]
        if group is not None and now is not None:
            where = "original held-out rows" if name == ALL else f"held-out labels of {name}"
            sentences.append(
                f"round {place.number}: {where}: accuracy {group.accuracy:.3f} before the patch, {now.accuracy:.3f} "
                f"after; mean margin {group.margin:.2f}, {now.margin:.2f} ({group.rows:,} rows)"
            )
    if chosen.share < 1:
        sentences.append(
            f"round {place.number}: the average with {chosen.share:g} of the patched weights is taken"
        )
    if chosen.costs:
        sentences.append(f"round {place.number}: the patch is not taken: {'; '.join(chosen.costs)}")
    return sentences
