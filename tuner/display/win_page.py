"""Policies compared, in a terminal and as one page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Group, RenderableType

from tuner.data.conversation import Prompt
from tuner.display.answer_sides import STYLE as STYLE_OF_SIDES
from tuner.display.answer_sides import prompt_article, side
from tuner.display.over_optimization_plots import STYLE as STYLE_OF_SIGNS
from tuner.display.page_frame import figure_boxes, page
from tuner.display.plots import BAR, WIDTH, Axes, key, line, shortened, svg, text
from tuner.display.rich_text import rich_text
from tuner.display.sheet import STYLE, html_table, minus, terminal_table
from tuner.evaluation.intervals import Interval
from tuner.evaluation.report_card.tables import Table as PlainTable
from tuner.evaluation.win_rate import (
    ALL,
    Contestant,
    Match,
    PolicyCard,
    PolicyFigures,
    WinRate,
    outcomes,
)
from tuner.printable import safe

SHORT_BY = {"score": "reward", "gold": "gold"}
"""Names of the judges in a table."""
MOST_BARS = 30
LARGEST = 10
"""Wins, losses and disagreements that have a section of their own."""
MOST_SHOWN = 500
"""Most prompts whose answers are on the page."""
STEP = 29
"""Distance from one bar to the next, in pixels."""

METHOD = (
    "The gap is the difference of mean scores. Ties count half; scores tie where they differ by less than 0.0001, "
    "gold scores where they are equal. Intervals are 95%: Tango's score "
    "interval for win rates (Wilson's where nothing ties), Wilson's for gold scores, the normal one for means. p is "
    "the sign test's: the probability of a result at least as uneven if both policies were equally good. In all of "
    "these, prompts that ask the same thing under several conditions count as one cluster."
)
METHOD_IN_BRIEF = "95% intervals in brackets; ties count half; the gap is the difference of mean scores."


def policy_terminal(card: PolicyCard) -> RenderableType:
    """The card for a rich console: who wins, tables of policies, win rates and replay loss.

    No fact is conveyed by color alone, and without a terminal it is plain lines.
    """
    shown: list[RenderableType] = []
    for match in card.matches:
        style = {"good": "bold green", "failed": "bold red", "remarks": "bold yellow"}[_kind(match)]
        shown += [rich_text(sentence, style=style) for sentence in sentences(card, match)]
    for title, table in _tables(card):
        shown += [rich_text(f"\n{title}" if shown else title, style="bold")]
        shown.append(terminal_table(table))
    shown += [rich_text(f"\n{METHOD_IN_BRIEF}", style="dim")]
    return Group(*shown)


def policy_html(card: PolicyCard, title: str, signs: str = "") -> str:
    """The card as one HTML page. signs: its sections on over-optimization."""
    verdicts = "".join(
        f'<div class="verdict {_kind(match)}">'
        + "".join(f"<div>{safe(sentence)}</div>" for sentence in sentences(card, match))
        + "</div>"
        for match in card.matches
    )
    tables = "".join(
        f"<section><h2>{safe(name)}</h2>{html_table('plain', table)}</section>"
        for name, table in _tables(card)
    )
    plots = "".join(_bars(card, match, judge) for match in card.matches for judge in match.rates)
    names = ", ".join(match.other.name for match in card.matches)
    heading = f"{title} against {names}" if names else title
    return page(
        heading,
        STYLE + STYLE_OF_SIDES + _STYLE + STYLE_OF_SIGNS,
        [
            f"<h1>{safe(heading)}</h1>",
            verdicts,
            figure_boxes(_figures(card)),
            f'<div class="plots">{plots}</div>',
            tables,
            signs,
            f'<section><p class="method">{safe(METHOD)}</p></section>',
            "".join(_answers(card)),
        ],
    )


def sentences(card: PolicyCard, match: Match) -> list[str]:
    """Who wins, by each judge; with a warning where the gold rule contradicts the reward trained on."""
    texts = []
    for judge, rates in match.rates.items():
        rate = rates[ALL].rate
        texts.append(
            f"{card.policy.name} wins {_percent(rate)} against {match.other.name} by the {card.judges[judge]}: "
            f"{_verdict(rate)}."
        )
    verdicts = {judge: _verdict(rates[ALL].rate) for judge, rates in match.rates.items()}
    if verdicts["score"] == "better" and verdicts.get("gold") == "worse":
        texts.append(
            f"Better by the {card.scorer} and worse by the gold rule: the policy exploits the {card.scorer}."
        )
    return texts


def _verdict(rate: Interval) -> str:
    return "better" if rate.low > 0.5 else "worse" if rate.high < 0.5 else "undecided"


def _kind(match: Match) -> str:
    """Class of a match's verdict on the page: how it is colored."""
    verdicts = {_verdict(rates[ALL].rate) for rates in match.rates.values()}
    return "failed" if "worse" in verdicts else "good" if verdicts == {"better"} else "remarks"


def _figures(card: PolicyCard) -> list[tuple[str, str]]:
    """(value, name) of the policy's figures at the top of the page."""
    overall = card.policy.figures[ALL]
    figures = [(_number(overall.score.value), f"score by the {card.scorer} {_brackets(overall.score)}")]
    if overall.gold is not None:
        figures.append(
            (_number(overall.gold.value), f"gold score by the gold rule {_brackets(overall.gold)}")
        )
    return [
        *figures,
        (f"{overall.ended:.0%}", "of answers ended"),
        (f"{overall.length:,.1f}", "tokens per answer, mean"),
        (f"{overall.prompts:,}", "prompts"),
    ]


def _tables(card: PolicyCard) -> Iterator[tuple[str, PlainTable]]:
    has_rule = card.policy.judged.golds_A is not None
    head = ["score", *(["gold"] if has_rule else [])]
    if card.matches:
        yield f"Win rate of {card.policy.name}", _wins(card)
    rows = []
    for contestant in card.contestants:
        overall = contestant.figures[ALL]
        rows.append([contestant.name, *_scores(overall), f"{overall.ended:.0%}", f"{overall.length:,.1f}"])
    yield "Policies", (["policy", *head, "ended", "length"], rows)
    conditions = [name for name in card.policy.figures if name != ALL]
    if conditions:
        rows = [
            [
                name,
                contestant.name,
                *_scores(by_condition := contestant.figures[name]),
                by_condition.prompts,
            ]
            for name in conditions
            for contestant in card.contestants
        ]
        yield "Policies by condition", (["condition", "policy", *head, "prompts"], rows)
    if card.replay:
        yield (
            "Loss of the replay set's held-out rows, by position",
            (
                ["from token", "to", "nats per token", "tokens"],
                [[part.start, part.end, part.loss, round(part.weight)] for part in card.replay],
            ),
        )


def _scores(figures: PolicyFigures) -> list[str]:
    scores = (figures.score, figures.gold)
    return [f"{_number(score.value)} {_brackets(score)}" for score in scores if score is not None]


def _wins(card: PolicyCard) -> PlainTable:
    names = ["against", "by", "prompts", "wins", "won/tied/lost", "p", "gap"]
    rows = []
    for match in card.matches:
        for judge, rates in match.rates.items():
            for name, rate in rates.items():
                cells = [
                    _percent(rate.rate),
                    f"{rate.wins}/{rate.ties}/{rate.losses}",
                    _probability(rate.p),
                    _number(rate.difference.value, "+.3f"),
                ]
                rows.append([match.other.name, SHORT_BY[judge], name or "all", *cells])
    return names, rows


def _percent(rate: Interval) -> str:
    return f"{100 * rate.value:.0f}% [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def _brackets(interval: Interval) -> str:
    return f"[{_number(interval.low, '.2f')}, {_number(interval.high, '.2f')}]"


def _number(value: float, shown: str = ".3f") -> str:
    return minus(format(value, shown))


def _probability(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _bars(card: PolicyCard, match: Match, judge: str) -> str:
    """Wins, ties and losses over all prompts and by condition, and the win rate with its interval."""
    rates = list(match.rates[judge].items())[: MOST_BARS + 1]
    height = 88 + STEP * len(rates)
    axes = Axes(left=148, top=44, right=WIDTH - 52, bottom=height - 40, along=(0.0, 1.0))
    body = (
        axes.across((0, 0.25, 0.5, 0.75, 1), "{:.0%}")
        + "".join(_bar(axes, axes.top + 8 + STEP * place, *rate) for place, rate in enumerate(rates))
        + line(axes.x(0.5), axes.top, axes.x(0.5), axes.bottom, "chance")
        + text(axes.x(0.5), axes.top - 6, "equally good", "middle")
        + key(axes.left, "a area", "won")
        + key(axes.left + 84, "tie", "tied")
        + key(axes.left + 168, "b area", "lost")
        + axes.named("prompts; dot: win rate with its 95% interval, ties half")
    )
    title = f"{card.policy.name} against {match.other.name}, by the {card.judges[judge]}"
    return svg(title, body, height)


def _bar(axes: Axes, top: float, name: str, rate: WinRate) -> str:
    name, middle = name or "all prompts", top + BAR / 2
    tooltip = (
        f"{name}: wins {_percent(rate.rate)}; {rate.wins:,} won, {rate.ties:,} tied, {rate.losses:,} lost"
    )
    drawn, start = "", 0
    for count, kind in ((rate.wins, "a area"), (rate.ties, "tie"), (rate.losses, "b area")):
        left, right = axes.x(start / rate.prompts), axes.x((start + count) / rate.prompts)
        drawn += (
            f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{BAR}"/>'
        )
        start += count
    low, dot, high = (axes.x(value) for value in (rate.rate.low, rate.rate.value, rate.rate.high))
    return (
        f"<g><title>{safe(tooltip)}</title>"
        + text(axes.left - 9, middle + 4, shortened(name), "end")
        + drawn
        + line(low, middle, high, middle, "whisker")
        + "".join(line(x, middle - 4, x, middle + 4, "whisker") for x in (low, high))
        + f'<circle class="rate" cx="{dot:.1f}" cy="{middle:.1f}" r="4.5"/>'
        + text(axes.right + 8, middle + 4, f"{rate.rate.value:.0%}", "start")
        + "</g>"
    )


def _answers(card: PolicyCard) -> Iterator[str]:
    """Sections of prompts with the answers of both policies of each match side by side, or of a policy alone."""
    if not card.matches:
        worst = np.argsort(card.policy.judged.scores_A, kind="stable")
        yield _chapter("Lowest scores", f"By the {card.scorer}.", [card.policy], worst[:LARGEST])
        yield _all([card.policy])
    for match in card.matches:
        pair = [card.policy, match.other]
        gaps_A = card.policy.judged.scores_A - match.other.judged.scores_A
        order = np.argsort(-gaps_A, kind="stable")
        signs_A = outcomes("score", card.policy.judged.scores_A, match.other.judged.scores_A)
        against, lost = f"against {match.other.name}", order[::-1]
        for title, chosen in (
            ("Largest wins", order[signs_A[order] > 0]),
            ("Largest losses", lost[signs_A[lost] < 0]),
        ):
            note = f"Of {card.policy.name} by the {card.scorer}. {_extent(len(chosen))}"
            yield _chapter(f"{title} {against}", note, pair, chosen[:LARGEST])
        golds_A, others_A = (policy.judged.golds_A for policy in pair)
        if golds_A is not None and others_A is not None:
            opposed = order[signs_A[order] * outcomes("gold", golds_A, others_A)[order] < 0]
            disagreements = sorted(opposed.tolist(), key=lambda index: -abs(gaps_A[index]))
            note = f"They prefer different answers. {_extent(len(disagreements))}"
            yield _chapter(
                f"{card.scorer.capitalize()} and gold rule disagree {against}",
                note,
                pair,
                disagreements[:LARGEST],
            )
        yield _all(pair)


def _extent(count: int) -> str:
    return f"The first {LARGEST} of {count:,}." if count > LARGEST else f"{count:,} in all."


def _chapter(
    title: str, note: str, policies: Sequence[Contestant], chosen: Sequence[int] | np.ndarray
) -> str:
    if not len(chosen):
        return ""
    return f"<section><h2>{safe(title)}</h2><p>{safe(note)}</p>{_prompts(policies, chosen)}</section>"


def _all(policies: Sequence[Contestant]) -> str:
    count = len(policies[0].judged.scores_A)
    shown = range(min(count, MOST_SHOWN))
    title = (
        f"All {count:,} prompts" if count <= MOST_SHOWN else f"The first {MOST_SHOWN:,} of {count:,} prompts"
    )
    names = " and ".join(policy.name for policy in policies)
    return (
        f"<section><details><summary>{title}, answered by {safe(names)}</summary>"
        f"{_prompts(policies, shown)}</details></section>"
    )


def _prompts(policies: Sequence[Contestant], chosen: Sequence[int] | np.ndarray) -> str:
    return "".join(_prompt(policies, int(index)) for index in chosen)


def _prompt(policies: Sequence[Contestant], index: int) -> str:
    prompt = policies[0].judged.prompts.prompt(index)
    scores = [float(policy.judged.scores_A[index]) for policy in policies]
    header = [f"gap {_number(scores[0] - scores[1], '+.3f')}"] if len(scores) > 1 else []
    header += [*filter(None, [prompt.condition]), prompt.origin]
    best = max(scores)
    sides = (
        _side(policy, index, kind, won=len(scores) > 1 and score == best and min(scores) < best)
        for policy, score, kind in zip(policies, scores, "ab", strict=False)
    )
    return prompt_article(header, _prompt_text(prompt), sides)


def _side(policy: Contestant, index: int, kind: str, *, won: bool) -> str:
    """One policy's answer; kind: "a" or "b", which is its color."""
    golds_A = policy.judged.golds_A
    facts = [
        *(["higher"] if won else []),
        f"score {_number(float(policy.judged.scores_A[index]))}",
        *([] if golds_A is None else [f"gold {float(golds_A[index]):g}"]),
        *([] if policy.answers.ended_A[index] else ["not ended"]),
    ]
    answer = policy.answers.texts[index]
    return side(policy.name, " · ".join(facts), answer, f"{kind} won" if won else kind)


def _prompt_text(prompt: Prompt) -> str:
    """The prompt's turns: a single one as it is, several with their roles."""
    turns = prompt.policy_input().turns
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


_STYLE = """
.verdict+.verdict{margin-top:8px}.verdict div:first-child{font-weight:600}
svg .b.area{fill:var(--b);stroke:none;opacity:.72}svg .tie{fill:var(--line)}
svg .rate{fill:var(--card);stroke:var(--ink);stroke-width:1.8}
.method{margin-top:14px}
summary{font-weight:600;margin:24px 0 8px}td summary{font-weight:400;margin:0}
"""
