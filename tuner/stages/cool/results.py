"""What a run in rounds came to, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuner.stages.cool.patch import RECORD
from tuner.stages.cool.patterns import Recorded, rewriting_of, share_of_form, start_and_end
from tuner.stages.cool.rounds import RoundPlace
from tuner.training.json_lines import read_json


def results_of(places: Sequence[RoundPlace]) -> dict[str, Any]:
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
        "hack": _shares(place.recorded, patterns),
        "patterns": _patterns(place),
        "patch": place.reward.read_json(RECORD),
        "labels": _labels(place),
    }


def _shares(recorded: Recorded, patterns: Sequence[str]) -> dict[str, float]:
    """Pattern of any round -> the share of the recorded answers in a round's last part that carry it."""
    _, end = start_and_end(recorded)
    texts = [str(row["answer"]) for row in end]
    return {name: share_of_form(rewriting_of(name), texts) for name in patterns}


def _patterns(place: RoundPlace) -> list[dict[str, Any]]:
    return read_json(place.patterns)["patterns"] if place.patterns.is_file() else []


def _labels(place: RoundPlace) -> dict[str, Any] | None:
    """What the labels of a round's candidates are worth; None where it had none."""
    if not place.labels.is_file():
        return None
    return place.label_files.figures()
