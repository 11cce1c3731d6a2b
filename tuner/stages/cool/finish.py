"""The end of a run in rounds: the last policy as its model, and what became of every round."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tuner.config import COOL
from tuner.errors import UserError
from tuner.models.atomic_folder import write_atomically
from tuner.models.merge import merge
from tuner.stages.context import Context
from tuner.stages.cool.page import write_page
from tuner.stages.cool.results import results_of
from tuner.stages.cool.rounds import RoundPlace, trained_rounds
from tuner.stages.cool.tracking import track_rounds
from tuner.stages.data_view import training_texts
from tuner.stages.run import Run
from tuner.training.json_lines import replace_text, to_json_line


def finish_rounds(config: COOL, context: Context) -> None:
    """Write the results of all rounds, their metrics one behind the other, and the last policy."""
    places = list(trained_rounds(config, context.run.folder))
    last = places[-1].policy
    results = results_of(places)
    if context.devices.is_main:
        text = "".join(map(to_json_line, _metrics(places)))
        replace_text(context.run.folder / "metrics.jsonl", text)
        write_page(context, places, results)
    track_rounds(config, context, results["rounds"])
    # before the run is finished: one that is killed in the merge goes on with it
    if config.merge and context.devices.is_main and (last.model_folder / "adapter_config.json").is_file():
        _merge(context, last)
    context.finish(results, lambda folder: _copy(last.model_folder, folder))


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
