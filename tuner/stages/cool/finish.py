"""The end of a run in rounds: the last policy as its model, and what became of every round."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tuner.config import COOL
from tuner.errors import UserError
from tuner.models.merge import merge
from tuner.stages.context import Context
from tuner.stages.cool.page import write_page
from tuner.stages.cool.patch import RECORD
from tuner.stages.cool.patterns import rewriting_of, share_of_form, start_and_end
from tuner.stages.cool.rounds import RoundPlace, trained_rounds
from tuner.stages.data_view import training_texts
from tuner.stages.run import Run
from tuner.training.checkpoint import write_atomically
from tuner.training.json_lines import read_json, replace_text, to_json_line


def finish_rounds(config: COOL, context: Context) -> None:
    """Write the results of all rounds, their metrics one behind the other, and the last policy."""
    places = list(trained_rounds(config, context.run.folder))
    last = places[-1].policy
    results = _results(places)
    if context.devices.is_main:
        text = "".join(map(to_json_line, _metrics(places)))
        replace_text(context.run.folder / "metrics.jsonl", text)
        write_page(context, places, results)
    context.finish(results, lambda folder: _copy(last.model_folder, folder))
    if config.merge and context.devices.is_main and (last.model_folder / "adapter_config.json").is_file():
        _merge(context, last)


def _results(places: Sequence[RoundPlace]) -> dict[str, Any]:
    """Of every round, and as a policy run has them: from before the first to after the last."""
    names = list(dict.fromkeys(pattern["name"] for place in places for pattern in _patterns(place)))
    rounds = [_round_results(place, names) for place in places]
    first, last = (place.policy.results or {} for place in (places[0], places[-1]))
    measures = {
        name: {"before": first[name]["before"], "after": last[name]["after"]}
        for name in ("gold", "score")
        if name in first and name in last
    }
    if "score" in measures and places[-1].reward.is_finished:
        # Each round has its own reward model: scores of the first and of the last are not of one scale.
        measures["score"] = last["score"]
    return {**measures, "kl": last.get("kl"), "rounds": rounds}


def _round_results(place: RoundPlace, patterns: Sequence[str]) -> dict[str, Any]:
    run = place.policy
    results = run.results or {}
    return {
        "round": place.number,
        "steps": len(run.metrics),
        **{name: results.get(name) for name in ("gold", "score", "kl", "replay") if name in results},
        "hack": _shares(run, patterns),
        "patterns": _patterns(place),
        "patch": place.reward.read_json(RECORD),
        "labels": _labels(place),
    }


def _shares(run: Run, patterns: Sequence[str]) -> dict[str, float]:
    """Pattern of any round -> the share of the recorded answers in the run's last part that carry it."""
    _, end = start_and_end(run.answers)
    texts = [str(row["answer"]) for row in end]
    return {name: share_of_form(rewriting_of(name), texts) for name in patterns}


def _patterns(place: RoundPlace) -> list[dict[str, Any]]:
    return read_json(place.patterns)["patterns"] if place.patterns.is_file() else []


def _labels(place: RoundPlace) -> dict[str, Any] | None:
    """What the labels of a round's candidates are worth; None where it had none."""
    if not place.labels.is_file():
        return None
    return place.label_files.figures()


def _metrics(places: Iterable[RoundPlace]) -> Iterable[dict[str, Any]]:
    """The records of all rounds; steps are counted on from round to round."""
    steps = 0
    for place in places:
        records = place.policy.metrics
        for record in records:
            yield {
                **record,
                "step": steps + record["step"],
                "round": place.number,
            }
        steps += len(records)


def _copy(model: Path, folder: Path) -> None:
    def write(unfinished: Path) -> None:
        shutil.copytree(model, unfinished, dirs_exist_ok=True)

    write_atomically(folder, write)


def _merge(context: Context, last: Run) -> None:
    output = context.run.folder / "merged"
    if output.exists():
        return
    try:
        # The config is the user's own, who started this run: its functions may be read.
        merge(last.folder, output, texts=training_texts(str(last.folder), trust=True))
    except UserError as error:
        context.say(f"the last policy is not merged: {error}")
    else:
        context.say(f"the last policy as a model of its own: {output}")
