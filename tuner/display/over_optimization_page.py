"""The signs of over-optimization of a policy run, in a terminal and as sections of a page.

A page of a run, and one of several rounds, puts them among its own: the functions return fragments of HTML, which need
the rules of `sheet.STYLE` and then those of `over_optimization_plots.STYLE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType

from tuner.display.over_optimization_plots import (
    gold_over_distance,
    golds_by_step,
    phrases_by_step,
    score_over_distance,
)
from tuner.display.rich_text import rich_text
from tuner.display.sheet import html_table, minus, terminal_table
from tuner.evaluation.intervals import Interval
from tuner.evaluation.over_optimization.form import FormEffect
from tuner.evaluation.over_optimization.report import OverOptimization, PhraseCourse
from tuner.evaluation.over_optimization.scaling_law import Law
from tuner.evaluation.report_card.tables import Table as PlainTable
from tuner.printable import safe

TITLE = "Over-optimization"
METHOD = (
    "The curve is R(d) = d (alpha − beta log d) with d = √KL, fitted by least squares (Gao et al., arXiv 2210.10760), "
    "and the band is the 95% interval of the distance at which it turns (Fieller's). Means over the first and the last "
    "steps have t intervals; a figure has moved where they differ by 4 standard errors."
)
METHOD_OF_ROUNDS = (
    "One law for all rounds, in the form that Gao et al. (arXiv 2210.10760) give for iterated RLHF: in round k the "
    "gold score is R(d) = d (alpha − beta log d + beta log k), so that it turns at k times the distance of round 1."
)
METHOD_OF_FORM = (
    "Answers to the test prompts, rewritten in form only and scored again. Moved: root mean square of the change over "
    "all answers, in standard deviations of their scores. Where the score falls and gold does not, the reward pays for "
    "the form."
)


def over_optimization_html(signs: OverOptimization, effects: Sequence[FormEffect] = ()) -> str:
    """Sections of a run: what the signs say, plots, and tables. effects: of its answers rewritten in form only."""
    plots = (
        gold_over_distance([signs], signs.law),
        score_over_distance([signs]),
        golds_by_step(signs),
        phrases_by_step(signs),
    )
    return (
        f"<section><h2>{TITLE}</h2>{_list(sentences(signs))}</section>"
        f'<div class="plots">{"".join(plots)}</div>'
        + "".join(
            f"<section><h2>{safe(title)}</h2><p>{safe(note)}</p>{html_table('plain', table)}</section>"
            for title, note, table in _tables(signs, effects)
        )
        + f'<section><p class="method">{safe(METHOD)}</p></section>'
    )


def rounds_html(rounds: Sequence[OverOptimization], law: Law | None) -> str:
    """A section of all rounds together. law: over the points of all of them."""
    plots = gold_over_distance(rounds, law) + score_over_distance(rounds)
    return (
        f"<section><h2>{TITLE} over rounds</h2>{_list(rounds_sentences(rounds, law))}"
        f"<p>{safe(METHOD_OF_ROUNDS)}</p></section>"
        f'<div class="plots">{plots}</div>'
    )


def over_optimization_terminal(signs: OverOptimization, effects: Sequence[FormEffect] = ()) -> RenderableType:
    """The same for a rich console, without plots."""
    shown: list[RenderableType] = [rich_text(f"\n{TITLE}", style="bold")]
    shown += [rich_text(f"- {sentence}") for sentence in sentences(signs)]
    for title, _, table in _tables(signs, effects):
        shown += [rich_text(f"\n{title}", style="bold"), terminal_table(table)]
    return Group(*shown)


def sentences(signs: OverOptimization) -> list[str]:
    """What the signs say of a run."""
    of_run: list[str] = []
    if signs.alarm is not None:
        of_run.append(alarm_sentence(signs.alarm["sign"], signs.alarm["step"], signs.alarm["model_step"]))
    of_run += [*_opposed_sentences(signs), *_law_sentences(signs), *signs.missing]
    of_run += [_phrase_sentence(course) for course in signs.phrases if _is_hack(course)]
    return of_run


def rounds_sentences(rounds: Sequence[OverOptimization], law: Law | None) -> list[str]:
    """Where the law over all rounds turns, in each."""
    if law is None:
        return ["too few steps with a gold score and a KL for a law over all rounds"]
    if law.turning_point is None:
        return [f"no turning point: {law.no_turning_point}"]
    numbers = [signs.points[0].round for signs in rounds if signs.points]
    return [
        f"round {number}: the gold score turns at distance {_with_interval(turn)}"
        for number in numbers
        if (turn := law.turning_point_of(number)) is not None
    ]


def alarm_sentence(sign: str, step: int, model_step: int) -> str:
    """What an alarm has done to a run."""
    model = "the last step's" if model_step == step else f"that of step {model_step:,}"
    return f"the alarm {sign!r} ended the run after step {step:,}; its model is {model}"


def _is_hack(course: PhraseCourse) -> bool:
    """Whether the answers that hold a growing phrase are worth less than the others."""
    return (
        course.gold_with is not None
        and course.gold_without is not None
        and course.gold_with < course.gold_without
    )


def _phrase_sentence(course: PhraseCourse) -> str:
    phrase = course.phrase
    return (
        f"{phrase.text!r} stands in {phrase.share:.0%} of the answers of the last steps, {phrase.share_before:.0%} of "
        f"those of the first and {course.share_of_best:.0%} of the best-scored; the gold score of answers with it is "
        f"{course.gold_with:.2f}, of the others {course.gold_without:.2f}: the reward may pay for it"
    )


def _phrase_row(course: PhraseCourse) -> list[str | None]:
    phrase = course.phrase
    golds = (course.gold_with, course.gold_without)
    return [
        phrase.text,
        *(f"{share:.0%}" for share in (phrase.share_before, phrase.share, course.share_of_best)),
        *(None if gold is None else f"{gold:.2f}" for gold in golds),
        ", ".join(f"{text} {share:.0%}" for text, share in phrase.mutants.items()) or None,
    ]


def _opposed_sentences(signs: OverOptimization) -> list[str]:
    """That the score has risen and what it stands for has fallen, where both have."""
    by_name = {drift.name: drift for drift in signs.drifts}
    score, gold = by_name.get("score"), by_name.get("gold")
    if score is None or gold is None or not (score.moved and gold.moved):
        return []
    if not (score.deviations > 0 > gold.deviations):
        return []
    return [
        minus(
            f"the score rose from {score.start.value:.2f} to {score.now.value:.2f} and the gold score fell from "
            f"{gold.start.value:.2f} to {gold.now.value:.2f}: the policy exploits the reward"
        )
    ]


def _law_sentences(signs: OverOptimization) -> list[str]:
    law = signs.law
    if law is None:
        return []
    turn, reached = law.turning_point_of(signs.points[0].round), signs.points[-1].distance
    if turn is None:
        return [f"no turning point: {law.no_turning_point}"]
    place = "beyond" if reached > turn.value else "short of"
    return [
        f"the gold score turns at distance {_with_interval(turn)}; the run ended at {reached:.2f}, {place} it"
    ]


def _tables(signs: OverOptimization, effects: Sequence[FormEffect]) -> Iterator[tuple[str, str, PlainTable]]:
    """(title, note, table) of every table that has rows."""
    if effects:
        yield "Form and score", METHOD_OF_FORM, _form_table(effects)
    if signs.phrases:
        yield (
            "Phrases that grow",
            "Share of the recorded answers in the first steps and in the last, and of the best-scored tenth of these; "
            "gold score of the answers with the phrase, and of those without. A mutant differs in one word, in answers "
            "that lack the phrase.",
            (
                ["phrase", "first", "last", "of the best", "gold with", "without", "mutants"],
                [_phrase_row(course) for course in signs.phrases],
            ),
        )
    if signs.drifts:
        rows = [
            [
                drift.title,
                _with_interval(drift.start),
                _with_interval(drift.now),
                "yes" if drift.moved else "–",
            ]
            for drift in signs.drifts
        ]
        yield (
            "Drift of the answers",
            "Means over the first and the last steps, with 95% intervals.",
            (["figure", "first steps", "last steps", "moved"], rows),
        )


def _form_table(effects: Sequence[FormEffect]) -> PlainTable:
    has_rule = any(effect.gold is not None for effect in effects)
    names = ["rewritten", "answers changed", "score", *(["gold"] if has_rule else []), "moved"]
    rows = [
        [
            effect.name,
            f"{effect.changed:,} of {effect.prompts:,}",
            _with_interval(effect.score, signed=True),
            *([_with_interval(effect.gold, signed=True)] if effect.gold is not None else []),
            None if effect.moved is None else f"{effect.moved:.2f}",
        ]
        for effect in effects
    ]
    return names, rows


def _with_interval(interval: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return minus(f"{interval.value:{sign}.2f} [{interval.low:{sign}.2f}, {interval.high:{sign}.2f}]")


def _list(texts: Sequence[str]) -> str:
    items = "".join(f"<li>{safe(text)}</li>" for text in texts)
    return f'<div class="verdict remarks"><ul>{items}</ul></div>' if items else ""
