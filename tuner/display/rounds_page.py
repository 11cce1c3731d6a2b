"""A run in rounds as one page of HTML that needs nothing else: rounds side by side, patches, labels, laws, answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tuner.display.answer_sides import STYLE as STYLE_OF_SIDES
from tuner.display.answer_sides import prompt_article, side
from tuner.display.over_optimization_page import over_optimization_html, rounds_html, sentences
from tuner.display.over_optimization_plots import STYLE as STYLE_OF_SIGNS
from tuner.display.over_optimization_plots import lines_by_step
from tuner.display.page_frame import figure_boxes, page
from tuner.display.round_facts import AnswerChanges, AnsweredPrompt, RoundFacts, RunInRounds
from tuner.display.rounds_tables import (
    kappas_table,
    labels_sentences,
    labels_table,
    patch_note,
    patch_table,
    patterns_table,
    rounds_table,
    verdict,
)
from tuner.display.sheet import STYLE, html_table, minus
from tuner.evaluation.report_card.tables import Table
from tuner.printable import safe

_COURSES = {
    "gold": ("Gold score of the rollouts", "mean gold score"),
    "score": ("Score of the rollouts", "mean score by the round's own reward model"),
    "kl": ("KL from the reference", "nats per token"),
}
"""Figure of the rollouts -> the title of its plot, and what is upward."""

NOTE_OF_ROUNDS = (
    "Held-out prompts before and after a round's training. The last answers are those recorded in the last fifth of a "
    "round's steps; brackets are 95% intervals, in which the answers to a prompt count as one cluster. Every round has "
    "its own reward model: scores of different rounds are not on one scale."
)
NOTE_OF_PATTERNS = (
    "What a round's best-scored answers had come to carry, beside its first answers. Whether that is good or bad is "
    "for the labels to say. More and fewer: intervals that do not overlap."
)
NOTE_OF_LABELS = (
    "Left: share of left answers chosen on the labeling page, whose order is random. Same again: silently repeated "
    "pairs decided alike. Alpha: Krippendorff's, of pairs that two or more decided, with its 95% interval."
)


def rounds_page(run: RunInRounds) -> str:
    """The page of a run."""
    title = f"{run.name}: {len(run.rounds)} round{'s' if len(run.rounds) > 1 else ''}"
    return page(
        title,
        STYLE + STYLE_OF_SIDES + STYLE_OF_SIGNS + _STYLE,
        [
            f"<h1>{safe(title)}</h1>",
            _verdict(run),
            figure_boxes(_figures(run)),
            _section("Rounds side by side", [NOTE_OF_ROUNDS], rounds_table(run)),
            f'<div class="plots">{"".join(_courses(run.rounds))}</div>',
            *_patches(run.rounds),
            _section("Patterns, and whether patches helped", [NOTE_OF_PATTERNS], patterns_table(run)),
            *_labels(run),
            rounds_html([place.signs for place in run.rounds], run.law),
            *map(_signs, run.rounds),
            *(chapter for change in run.changes for chapter in _changes(change)),
            *(chapter for place in run.rounds for chapter in _worst(place)),
        ],
    )


def _verdict(run: RunInRounds) -> str:
    kind, verdict_sentences = verdict(run)
    items = "".join(f"<li>{safe(sentence)}</li>" for sentence in verdict_sentences)
    return f'<div class="verdict {kind}"><ul>{items}</ul></div>' if items else ""


def _figures(run: RunInRounds) -> list[tuple[str, str]]:
    """(value, name) of the figures at the top."""
    first, last = run.rounds[0], run.rounds[-1]
    figures = [(f"{sum(place.steps for place in run.rounds):,}", "steps of the policies")]
    if "gold" in last.measures and "gold" in first.measures:
        before, after = first.measures["gold"][0], last.measures["gold"][1]
        figures.append((_number(after), f"gold score after all rounds, {_number(before)} before"))
    if "score" in last.measures:
        before, after = last.measures["score"]
        figures.append((_number(after), f"score after the last round, {_number(before)} before it"))
    if last.kl is not None:
        figures.append((_number(last.kl), "KL from the reference, nats per token"))
    labels = [place.labels for place in run.rounds if place.labels is not None]
    if labels:
        usable, pairs = (sum(getattr(part, name) for part in labels) for name in ("usable", "pairs"))
        figures.append((f"{usable:,}", f"of {pairs:,} pairs decided by labels"))
    return figures


def _section(title: str, notes: Sequence[str], table: Table) -> str:
    """A section with a table; empty where that has no rows."""
    if not table[1]:
        return ""
    text = "".join(f"<p>{safe(note)}</p>" for note in notes)
    return f"<section><h2>{safe(title)}</h2>{text}{html_table('facts', table)}</section>"


def _courses(rounds: Sequence[RoundFacts]) -> Iterator[str]:
    """Plots over the steps of the rounds: figures, and the share of answers that carry each pattern."""
    patterns = dict.fromkeys(name for place in rounds for name in place.pattern_courses)
    for name, (title, up) in _COURSES.items():
        yield lines_by_step(title, up, {_name(place): place.courses.get(name, ()) for place in rounds})
    for name in patterns:
        series = {_name(place): place.pattern_courses.get(name, ()) for place in rounds}
        yield lines_by_step(
            f"Answers that carry {name}", "share of the recorded ones", series, from_zero=True
        )


def _name(place: RoundFacts) -> str:
    return f"round {place.number}"


def _patches(rounds: Sequence[RoundFacts]) -> Iterator[str]:
    for place in rounds:
        if place.patch is not None:
            title = f"Reward model before and after the patch of round {place.number}"
            yield _section(title, [f"{patch_note(place.patch)}."], patch_table(place.patch))


def _labels(run: RunInRounds) -> Iterator[str]:
    notes = ["\n".join(labels_sentences(run)), NOTE_OF_LABELS]
    yield _section("Labels", notes, labels_table(run))
    yield _section("Agreement of two annotators", ["Cohen's kappa."], kappas_table(run))


def _signs(place: RoundFacts) -> str:
    first = next(iter(sentences(place.signs)), "")
    return (
        f"<section><details><summary>Round {place.number} alone{safe(f': {first}' if first else '')}</summary>"
        f"{over_optimization_html(place.signs)}</details></section>"
    )


def _changes(change: AnswerChanges) -> Iterator[str]:
    before, now = change.rounds
    if not change.prompts:
        yield (
            f"<section><h2>Answers of round {before} and {now}</h2><p>No prompt was answered at the end of both.</p>"
            "</section>"
        )
    note = (
        f"Of {change.prompts:,} prompts that were answered at the end of both rounds; the last answer to each. "
        + ("Gold scores." if change.measure == "gold" else "Scores, by the reward model of each round.")
    )
    for title, prompts in (("better", change.risen), ("worse", change.fallen)):
        yield _chapter(f"Most changed for the {title} from round {before} to {now}", note, prompts)


def _worst(place: RoundFacts) -> Iterator[str]:
    note = "Among the last answers, by the round's own reward model."
    yield _chapter(f"Best-scored with gold 0 in round {place.number}", note, place.best_without_gold)
    yield _chapter(f"Worst-scored in round {place.number}", note, place.worst_scored, is_open=False)


def _chapter(title: str, note: str, prompts: Sequence[AnsweredPrompt], *, is_open: bool = True) -> str:
    if not prompts:
        return ""
    return (
        f"<section><details{' open' if is_open else ''}><summary>{safe(title)}</summary><p>{safe(note)}</p>"
        f"{''.join(map(_article, prompts))}</details></section>"
    )


def _article(prompt: AnsweredPrompt) -> str:
    best = max(prompt.answers, key=lambda answer: (answer.gold or 0.0, answer.score))
    header = [*([prompt.condition] if prompt.condition else []), prompt.origin]
    sides = (
        side(
            f"round {answer.round}",
            " · ".join(
                [
                    f"step {answer.step:,}",
                    f"score {_number(answer.score)}",
                    *([] if answer.gold is None else [f"gold {answer.gold:g}"]),
                ]
            ),
            answer.text,
            f"{kind} won" if answer is best and len(prompt.answers) > 1 else kind,
        )
        for answer, kind in zip(prompt.answers, "ab", strict=False)
    )
    return prompt_article(header, prompt.prompt, sides)


def _number(value: float | None) -> str:
    return "–" if value is None else minus(f"{value:.3f}")


_STYLE = """
section>details>summary{font-weight:600;margin:24px 0 8px;overflow-wrap:anywhere}
.facts th,.facts td{white-space:nowrap}.facts td:first-child{white-space:normal}
.plots{margin-top:14px}.plots:empty{display:none}
"""
