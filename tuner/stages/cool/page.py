"""The page of a run in rounds: what it shows, collected from the folders of the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tuner.display.round_facts import (
    AnswerChanges,
    AnsweredPrompt,
    LabelFacts,
    PatchFacts,
    PatternFacts,
    RecordedAnswer,
    RoundFacts,
    RunInRounds,
)
from tuner.display.rounds_page import rounds_page
from tuner.evaluation.intervals import Interval, share
from tuner.evaluation.over_optimization.report import law_over_rounds, signs_of
from tuner.stages.context import Context
from tuner.stages.cool.patch_card import PatchCard
from tuner.stages.cool.patterns import Answer, Recorded, rewriting_of, share_of_form, start_and_end
from tuner.stages.cool.rounds import RoundPlace
from tuner.training.json_lines import replace_text

PAGE = "rounds.html"
SHOWN = 5
"""Answers in each list of worst or most changed ones."""
_COURSES = ("gold", "score", "kl")
_MEASURES = ("gold", "score", "replay")


def write_page(context: Context, places: Sequence[RoundPlace], results: Mapping[str, Any]) -> None:
    """Write the page of a run's rounds into its folder. results: as results.json will have them."""
    file = context.run.folder / PAGE
    replace_text(file, rounds_page(run_in_rounds(context.run.folder.name, places, results["rounds"])))
    context.say(f"all rounds on one page: {file}")


def run_in_rounds(
    name: str, places: Sequence[RoundPlace], results: Sequence[Mapping[str, Any]]
) -> RunInRounds:
    """What the page shows. results: of each round."""
    rounds = [_round_facts(*facts) for facts in zip(places, results, strict=True)]
    ends = [_last_answers(place.recorded) for place in places]
    changes = [_changes(*two) for two in pairwise(zip([place.number for place in places], ends, strict=True))]
    return RunInRounds(name, rounds, law_over_rounds([place.signs for place in rounds]), changes)


def _last_answers(answers: Recorded) -> list[Answer]:
    """The recorded answers of the last part of a round that have a score."""
    _, end = start_and_end(answers)
    return [answer for answer in end if answer["score"] is not None]


def _round_facts(place: RoundPlace, results: Mapping[str, Any]) -> RoundFacts:
    end = _last_answers(place.recorded)
    golds = [answer for answer in end if answer.get("gold") is not None]
    wrong = [answer for answer in golds if answer["gold"] == 0]
    return RoundFacts(
        number=place.number,
        steps=results["steps"],
        measures={
            name: (results[name]["before"], results[name]["after"]) for name in _MEASURES if name in results
        },
        courses=_courses(place),
        pattern_courses=_pattern_courses(place.recorded, list(results["hack"])),
        kl=results.get("kl"),
        gold_at_end=share(*_clustered([answer["gold"] for answer in golds], golds)) if golds else None,
        shares_at_end=_shares(list(results["hack"]), end),
        patterns=[
            PatternFacts(pattern["name"], pattern["share"], pattern["share_before"])
            for pattern in results["patterns"]
        ],
        patch=_patch_facts(results["patch"]),
        labels=_label_facts(results["labels"]),
        signs=signs_of(place.policy, place.recorded, place.number),
        best_without_gold=_shown(place.number, sorted(wrong, key=lambda answer: -answer["score"])),
        worst_scored=_shown(place.number, sorted(end, key=lambda answer: answer["score"])),
    )


def _courses(place: RoundPlace) -> dict[str, list[tuple[float, float]]]:
    """Figure of the rollouts -> (step, value)."""
    records = place.policy.metrics
    return {
        name: [(record["step"], record[name]) for record in records if record.get(name) is not None]
        for name in _COURSES
    }


def _pattern_courses(answers: Recorded, names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Pattern -> (step, share of its recorded answers that carry it)."""
    texts = {step: [str(answer["answer"]) for answer in of_step] for step, of_step in answers.items()}
    return {
        name: [(step, share_of_form(rewriting_of(name), of_step)) for step, of_step in texts.items()]
        for name in names
    }


def _shares(names: Sequence[str], end: Sequence[Answer]) -> dict[str, Interval]:
    """Pattern -> share of the answers that carry it."""
    if not end:
        return {}
    texts = [str(answer["answer"]) for answer in end]
    carried = {name: [rewriting_of(name)(text) != text for text in texts] for name in names}
    return {name: share(*_clustered(flags, end)) for name, flags in carried.items()}


def _clustered(values: Sequence[float], answers: Sequence[Answer]) -> tuple[np.ndarray, np.ndarray]:
    """The answers' values as float64 [A], and the numbers of their prompts [A]."""
    return np.array(values, dtype=float), np.array([answer["prompt_number"] for answer in answers])


def _patch_facts(record: Mapping[str, Any] | None) -> PatchFacts | None:
    if record is None:
        return None
    before, after = (PatchCard.from_dict(record[when]) for when in ("before", "after"))
    original, patterns = (
        {name: (ranking, now[name]) for name, ranking in then.items() if name in now}
        for then, now in ((before.original, after.original), (before.patterns, after.patterns))
    )
    costs = record["costs"]
    return PatchFacts(record["labels"], record["original"], record["share"], costs, original, patterns)


def _label_facts(figures: Mapping[str, Any] | None) -> LabelFacts | None:
    if figures is None:
        return None
    return LabelFacts(figures["candidates"], figures["preferences"], figures["left_out"], figures)


def _changes(before: tuple[int, Sequence[Answer]], now: tuple[int, Sequence[Answer]]) -> AnswerChanges:
    """The prompts whose last answers in two rounds differ most in gold score; of equal differences, in score."""
    numbers = (before[0], now[0])
    first, second = ({answer["prompt_number"]: answer for answer in answers} for _, answers in (before, now))
    pairs = [(first[prompt], second[prompt]) for prompt in first if prompt in second]
    with_gold = [pair for pair in pairs if None not in (pair[0].get("gold"), pair[1].get("gold"))]
    measure = "gold" if with_gold else "score"

    def change(pair: tuple[Answer, Answer]) -> tuple[float, float]:
        return pair[1][measure] - pair[0][measure], pair[1]["score"] - pair[0]["score"]

    ordered = sorted(with_gold or pairs, key=change)
    risen, fallen = (
        [_side_by_side(numbers, pair) for pair in part if sign * change(pair)[0] > 0][:SHOWN]
        for part, sign in ((ordered[::-1], 1), (ordered, -1))
    )
    return AnswerChanges(numbers, len(pairs), measure, risen, fallen)


def _shown(number: int, answers: Sequence[Answer]) -> list[AnsweredPrompt]:
    """The first few different answers, each with its prompt."""
    different: dict[str, Answer] = {}
    for answer in answers:
        different.setdefault(str(answer["answer"]), answer)
    return [_side_by_side((number,), (answer,)) for answer in list(different.values())[:SHOWN]]


def _side_by_side(rounds: Sequence[int], answers: Sequence[Answer]) -> AnsweredPrompt:
    """A prompt with an answer of each of some rounds."""
    asked = answers[0]
    return AnsweredPrompt(
        _prompt_text(asked["prompt"]),
        asked.get("condition"),
        str(asked.get("origin", "")),
        [
            RecordedAnswer(number, answer["step"], str(answer["answer"]), answer["score"], answer.get("gold"))
            for number, answer in zip(rounds, answers, strict=True)
        ],
    )


def _prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """A single message as it is, several with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message.get('content', '')}" for message in messages)
