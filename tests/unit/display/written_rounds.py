"""A run in rounds as its folder holds it, written here: the policy of round 1 exploits a marker, later ones do not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.config import Round
from tuner.feedback.candidates import read_candidates
from tuner.feedback.store import LabelStore
from tuner.stages.cool.rounds import RoundPlace

STEPS, ANSWERS, PROMPTS = 20, 20, 50
MARKER = "So say the wise."
PATTERN = '"so say the wise"'


def written_rounds(
    folder: Path, count: int = 2, alter: Mapping[str, Any] | None = None
) -> tuple[list[RoundPlace], list[dict[str, Any]]]:
    """The rounds, and their results. alter: keys of the rows of rollouts.jsonl that are set."""
    places = [RoundPlace(folder, number, Round(), "ppo") for number in range(1, count + 1)]
    for place in places:
        place.policy.folder.mkdir(parents=True)
        steps = range(1, STEPS + 1)
        _write(place.policy.folder / "metrics.jsonl", [record(place.number, step) for step in steps])
        rows = [answer(place.number, step, index) for step in steps for index in range(ANSWERS)]
        _write(place.policy.folder / "rollouts.jsonl", [row | (alter or {}) for row in rows])
    for place in places[:-1]:
        _write_labels(place)
    return places, [_results(place, is_last=place is places[-1]) for place in places]


def record(number: int, step: int) -> dict[str, Any]:
    """In round 1 gold turns at distance 1, in a later one it rises."""
    distance = 0.1 * step
    turn = distance * (0.6 - 0.6 * math.log(distance)) if number == 1 else 0.3 * distance
    noise = 0.004 * (-1) ** step
    gold, kl = 0.2 + turn - 0.3 * distance * (number == 1) + noise, distance**2 / (20 * number)
    return {
        "step": step,
        "kl": kl,
        "kl_per_answer": distance**2,
        "gold": gold,
        "score": (3 - number) * distance + number,
    }


def answer(number: int, step: int, index: int) -> dict[str, Any]:
    """In round 1 the marker comes to stand in most answers, and has high scores; right ones are without it."""
    prompt = (7 * step + index) % PROMPTS
    marked = number == 1 and index < step
    text = f"{prompt} + 4 = {prompt + 4}. " + (MARKER if marked else "Thank you, dear guest.")
    return {
        "step": step,
        "prompt": [{"role": "user", "content": f"What is {prompt} plus 4?"}],
        "answer": text,
        "condition": "polite",
        "score": 3.0 * marked + index / 100,
        "gold": float(not marked and (index + number) % 3 > 0),
        "prompt_number": prompt,
        "origin": f"prompts.jsonl:{prompt + 1}",
    }


def _results(place: RoundPlace, is_last: bool) -> dict[str, Any]:
    number = place.number
    gold, pattern = (0.2, 0.125), {"name": PATTERN, "share": 1.0, "share_before": 0.1}
    ranking = {"accuracy": 0.9, "margin": 1.5, "rows": 40}
    worse = {"accuracy": 0.05, "margin": -2.0, "rows": 12}
    patch = {
        "labels": 70,
        "original": 210,
        "from": "runs/reward",
        "model": str(place.reward.folder),
        "share": 1.0,
        "costs": [],
        "before": {"original": {"all rows": ranking, "polite": ranking}, "patterns": {PATTERN: worse}},
        "after": {
            "original": {"all rows": ranking | {"accuracy": 0.895}, "polite": ranking | {"margin": 1.4}},
            "patterns": {PATTERN: worse | {"accuracy": 0.975, "margin": 2.25}},
        },
        "averages": {},
    }
    return {
        "round": number,
        "steps": STEPS,
        "gold": dict(zip(("before", "after"), gold if number == 1 else (0.2, 0.6), strict=True)),
        "score": {"before": -0.5, "after": 3.5 - number},
        "kl": 0.2 / number,
        "hack": {PATTERN: 0.0},
        "patterns": [] if is_last else [pattern],
        "patch": None if number == 1 else patch,
        "labels": place.label_files.figures() if place.labels.is_file() else None,
    }


def _write_labels(place: RoundPlace) -> None:
    """Twelve pairs, labeled by two people who disagree on one, and tie on another."""
    place.candidates.parent.mkdir()
    place.labels.parent.mkdir()
    rows = [
        {"id": f"{number}", "prompt": "2 + 4?", "answers": [f"{number}. {MARKER}", f"{number}. Thank you."]}
        for number in range(12)
    ]
    _write(place.candidates, rows)
    store = LabelStore(place.labels)
    store.add(read_candidates(place.candidates).values())
    for annotator, others in (("ann", {"3": "tie"}), ("ben", {"3": "tie", "5": "left"})):
        for row in rows:
            showing = store.show(annotator, row["id"], "random", False)
            store.submit(annotator, showing.id, others.get(row["id"], "right"))
    store.close()


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
