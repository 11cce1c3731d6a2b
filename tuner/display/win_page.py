"""Policies compared, for people: in the terminal, and as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from tuner.data.conversation import Prompt
from tuner.display.plots import Axes, line, svg, text
from tuner.display.sheet import STYLE, html_table, minus, safe, terminal_table
from tuner.evaluation.intervals import Interval
from tuner.evaluation.report_card.tables import Table as PlainTable
from tuner.evaluation.win_rate import (
    ALL,
    Contestant,
    Match,
    Measured,
    PolicyCard,
    WinRate,
    measure,
    outcomes,
)
from tuner.printable import printable

BY = {"score": "the reward model", "gold": "the rule"}
SHORT_BY = {"score": "reward", "gold": "rule"}
"""Judges in words, in a sentence and in a table."""
MOST_BARS = 30
LARGEST = 10
"""Wins, losses and disagreements that are shown apart."""
MOST_SHOWN = 500
"""Prompts whose answers a page holds in all."""
LABEL = 19
"""Characters of a name that fit beside a bar; the rest is in its tooltip."""
WIDTH, BAR, STEP = 500, 15, 29

METHOD = (
    "Score is the reward model's, gold the rule's; gap is that of the mean scores. Ties count half; learned scores "
    "that differ by less than 0.0001 tie. Intervals are of 95%: win rates have Tango's score interval, which is "
    "Wilson's where nothing ties, gold scores Wilson's, means the normal one. p is the sign test's: how likely as "
    "uneven a result would be, were both as good. Prompts that ask the same thing under several conditions stand and "
    "fall together in all of these."
)
BRIEFLY = "In brackets 95% intervals; ties count half; a gap is that of the mean scores."


def policy_terminal(card: PolicyCard) -> RenderableType:
    """The card for a rich console: who wins, tables of policies, win rates and replay loss.

    Nothing is said by colour alone, and without a terminal it reads as plain lines.
    """
    shown: list[RenderableType] = []
    for match in card.matches:
        style = {"good": "bold green", "failed": "bold red", "remarks": "bold yellow"}[_kind(match)]
        shown += [Text(printable(one), style=style) for one in sentences(card.own, match)]
    for title, table in _tables(card):
        shown += [Text(f"\n{printable(title)}" if shown else printable(title), style="bold")]
        shown.append(terminal_table(table))
    shown += [Text(f"\n{BRIEFLY}", style="dim")]
    return Group(*shown)


def policy_html(card: PolicyCard, title: str) -> str:
    """The card as one HTML page; light and dark as the reader's system is."""
    verdicts = "".join(
        f'<div class="verdict {_kind(match)}">'
        + "".join(f"<div>{safe(one)}</div>" for one in sentences(card.own, match))
        + "</div>"
        for match in card.matches
    )
    figures = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in _figures(card))
    tables = "".join(
        f"<section><h2>{safe(name)}</h2>{html_table('plain', table)}</section>"
        for name, table in _tables(card)
    )
    names = ", ".join(match.other.name for match in card.matches)
    return _PAGE.format(
        title=safe(f"{title} against {names}" if names else title),
        style=STYLE + _STYLE,
        verdicts=verdicts,
        figures=figures,
        plots="".join(_bars(card.own, match, judge) for match in card.matches for judge in match.rates),
        tables=tables,
        method=safe(METHOD),
        answers="".join(_answers(card)),
    )


def sentences(own: Contestant, match: Match) -> list[str]:
    """Who wins, by each judge; and a warning where the rule does not agree with a reward model that is learned from."""
    said = []
    for judge, rates in match.rates.items():
        rate = rates[ALL].rate
        said.append(
            f"{own.name} wins {_percent(rate)} against {match.other.name} by {BY[judge]}: {_told(rate)}."
        )
    told = {judge: _told(rates[ALL].rate) for judge, rates in match.rates.items()}
    if told["score"] == "better" and told.get("gold") == "worse":
        said.append("Better by the reward model and worse by the rule: the policy exploits the reward model.")
    return said


def _told(rate: Interval) -> str:
    return "better" if rate.low > 0.5 else "worse" if rate.high < 0.5 else "undecided"


def _kind(match: Match) -> str:
    told = [_told(rates[ALL].rate) for rates in match.rates.values()]
    return "failed" if "worse" in told else "good" if set(told) == {"better"} else "remarks"


def _figures(card: PolicyCard) -> list[tuple[str, str]]:
    """(value, name) of what to read first of the policy itself, as HTML."""
    found = measure(card.own)[ALL]
    said = [(_number(found.score.value), f"learned score {_around(found.score)}")]
    if found.gold is not None:
        said.append((_number(found.gold.value), f"gold score by rule {_around(found.gold)}"))
    return [
        *said,
        (f"{found.ended:.0%}", "of answers ended"),
        (f"{found.length:,.1f}", "tokens an answer, mean"),
        (f"{found.prompts:,}", "prompts"),
    ]


def _tables(card: PolicyCard) -> Iterator[tuple[str, PlainTable]]:
    measured = {one.path: measure(one) for one in card.contestants}
    ruled = card.own.judged.golds_A is not None
    head = ["score", *(["gold"] if ruled else [])]
    if card.matches:
        yield f"Win rate of {card.own.name}", _wins(card)
    rows = []
    for one in card.contestants:
        found = measured[one.path][ALL]
        rows.append([one.name, *_scores(found), f"{found.ended:.0%}", f"{found.length:,.1f}"])
    yield "Policies", (["policy", *head, "ended", "length"], rows)
    conditions = [name for name in measured[card.own.path] if name != ALL]
    if conditions:
        rows = [
            [name, one.name, *_scores(measured[one.path][name]), measured[one.path][name].prompts]
            for name in conditions
            for one in card.contestants
        ]
        yield "Policies by condition", (["condition", "policy", *head, "prompts"], rows)
    if card.replay:
        yield (
            "Loss of the replay set's held-out rows, by position",
            (
                ["from token", "to", "nats per token", "tokens"],
                [[one.start, one.end, one.loss, round(one.weight)] for one in card.replay],
            ),
        )


def _scores(found: Measured) -> list[str]:
    return [f"{_number(one.value)} {_around(one)}" for one in (found.score, found.gold) if one is not None]


def _wins(card: PolicyCard) -> PlainTable:
    names = ["against", "by", "prompts", "wins", "won/tied/lost", "p", "gap"]
    rows = []
    for match in card.matches:
        for judge, rates in match.rates.items():
            for name, one in rates.items():
                counts = f"{one.wins}/{one.ties}/{one.losses}"
                found = [
                    _percent(one.rate),
                    counts,
                    _probability(one.p),
                    _number(one.difference.value, "+.3f"),
                ]
                rows.append([match.other.name, SHORT_BY[judge], name or "all", *found])
    return names, rows


def _percent(rate: Interval) -> str:
    return f"{100 * rate.value:.0f}% [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def _around(interval: Interval) -> str:
    return f"[{_number(interval.low, '.2f')}, {_number(interval.high, '.2f')}]"


def _number(value: float, shown: str = ".3f") -> str:
    return minus(format(value, shown))


def _probability(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _bars(own: Contestant, match: Match, judge: str) -> str:
    """Wins, ties and losses on all prompts and by condition, and the win rate with its interval."""
    rates = list(match.rates[judge].items())[: MOST_BARS + 1]
    height = 88 + STEP * len(rates)
    axes = Axes(left=148, top=44, right=WIDTH - 52, bottom=height - 40, along=(0.0, 1.0))
    body = (
        axes.across((0, 0.25, 0.5, 0.75, 1), "{:.0%}")
        + "".join(_bar(axes, axes.top + 8 + STEP * place, *one) for place, one in enumerate(rates))
        + line(axes.x(0.5), axes.top, axes.x(0.5), axes.bottom, "chance")
        + text(axes.x(0.5), axes.top - 6, "as good", "middle")
        + _key(axes.left, "a area", "won")
        + _key(axes.left + 84, "tie", "tied")
        + _key(axes.left + 168, "b area", "lost")
        + axes.named("prompts; the dot is the win rate, ties half, with its 95% interval")
    )
    named = f"{own.name} against {match.other.name}, by {BY[judge]}"
    return svg(printable(named), body, height)


def _bar(axes: Axes, top: float, name: str, one: WinRate) -> str:
    name, middle = printable(name or "all prompts"), top + BAR / 2
    short = name if len(name) <= LABEL else name[: LABEL - 1] + "…"
    said = f"{name}: wins {_percent(one.rate)}; {one.wins:,} won, {one.ties:,} tied, {one.losses:,} lost"
    drawn, start = "", 0
    for count, kind in ((one.wins, "a area"), (one.ties, "tie"), (one.losses, "b area")):
        left, right = axes.x(start / one.prompts), axes.x((start + count) / one.prompts)
        drawn += (
            f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{BAR}"/>'
        )
        start += count
    low, rate, high = (axes.x(value) for value in (one.rate.low, one.rate.value, one.rate.high))
    return (
        f"<g><title>{safe(said)}</title>"
        + text(axes.left - 9, middle + 4, short, "end")
        + drawn
        + line(low, middle, high, middle, "whisker")
        + "".join(line(x, middle - 4, x, middle + 4, "whisker") for x in (low, high))
        + f'<circle class="rate" cx="{rate:.1f}" cy="{middle:.1f}" r="4.5"/>'
        + text(axes.right + 8, middle + 4, f"{one.rate.value:.0%}", "start")
        + "</g>"
    )


def _key(x: float, kind: str, name: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="6" width="22" height="11"/>' + text(
        x + 29, 16, name, "start"
    )


def _answers(card: PolicyCard) -> Iterator[str]:
    """Prompts with their answers side by side, of every match; of a policy alone its own."""
    if not card.matches:
        worst = np.argsort(card.own.judged.scores_A, kind="stable")
        yield _chapter("Lowest scores", "By the reward model.", [card.own], worst[:LARGEST])
        yield _all([card.own])
    for match in card.matches:
        pair = [card.own, match.other]
        apart_A = card.own.judged.scores_A - match.other.judged.scores_A
        order = np.argsort(-apart_A, kind="stable")
        signs_A = outcomes("score", card.own.judged.scores_A, match.other.judged.scores_A)
        against, lost = f"against {match.other.name}", order[::-1]
        for title, chosen in (
            ("Largest wins", order[signs_A[order] > 0]),
            ("Largest losses", lost[signs_A[lost] < 0]),
        ):
            note = f"Of {card.own.name} by the reward model. {_of(len(chosen))}"
            yield _chapter(f"{title} {against}", note, pair, chosen[:LARGEST])
        own_A, other_A = (one.judged.golds_A for one in pair)
        if own_A is not None and other_A is not None:
            apart = order[signs_A[order] * outcomes("gold", own_A, other_A)[order] < 0]
            apart = sorted(apart.tolist(), key=lambda index: -abs(apart_A[index]))
            note = f"On which of the two answers is better. {_of(len(apart))}"
            yield _chapter(f"Reward model and rule disagree {against}", note, pair, apart[:LARGEST])
        yield _all(pair)


def _of(count: int) -> str:
    return f"The first {LARGEST} of {count:,}." if count > LARGEST else f"{count:,} in all."


def _chapter(title: str, note: str, policies: Sequence[Contestant], chosen: Sequence[int]) -> str:
    if not len(chosen):
        return ""
    return f"<section><h2>{safe(title)}</h2><p>{safe(note)}</p>{_prompts(policies, chosen)}</section>"


def _all(policies: Sequence[Contestant]) -> str:
    count = len(policies[0].judged.scores_A)
    shown = range(min(count, MOST_SHOWN))
    title = (
        f"All {count:,} prompts" if count <= MOST_SHOWN else f"The first {MOST_SHOWN:,} of {count:,} prompts"
    )
    names = " and ".join(one.name for one in policies)
    return (
        f"<section><details><summary>{title}, answered by {safe(names)}</summary>"
        f"{_prompts(policies, shown)}</details></section>"
    )


def _prompts(policies: Sequence[Contestant], chosen: Sequence[int]) -> str:
    return "".join(_prompt(policies, int(index)) for index in chosen)


def _prompt(policies: Sequence[Contestant], index: int) -> str:
    prompt = policies[0].judged.prompts.prompt(index)
    scores = [float(one.judged.scores_A[index]) for one in policies]
    said = [f"gap {_number(scores[0] - scores[1], '+.3f')}"] if len(scores) > 1 else []
    said += [*filter(None, [prompt.condition]), prompt.origin]
    best = max(scores)
    sides = "".join(
        _side(one, index, colour, won=len(scores) > 1 and score == best and min(scores) < best)
        for one, score, colour in zip(policies, scores, "ab", strict=False)
    )
    return (
        f"<article><header>{safe(' · '.join(said))}</header><pre>{safe(_asked(prompt))}</pre>"
        f'<div class="sides">{sides}</div></article>'
    )


def _side(one: Contestant, index: int, colour: str, *, won: bool) -> str:
    golds_A = one.judged.golds_A
    said = f"score {_number(float(one.judged.scores_A[index]))}"
    said += "" if golds_A is None else f" · gold {float(golds_A[index]):g}"
    said += "" if one.answers.ended_A[index] else " · not ended"
    answer = one.answers.texts[index]
    return (
        f'<div class="side {colour}{" won" if won else ""}"><b>{safe(one.name)}</b> '
        f"<span>{'higher · ' if won else ''}{said}</span>"
        f"<pre>{safe(answer) if answer.strip() else '<i>nothing</i>'}</pre></div>"
    )


def _asked(prompt: Prompt) -> str:
    """What the policy was asked: one turn as it is, several with who says them."""
    turns = prompt.asked().turns
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1>
{verdicts}
<div class="figures">{figures}</div>
<div class="plots">{plots}</div>
{tables}
<section><p class="method">{method}</p></section>
{answers}
</main></body></html>
"""

_STYLE = """
.verdict+.verdict{margin-top:8px}.verdict div:first-child{font-weight:600}
svg .b.area{fill:var(--b);stroke:none;opacity:.72}svg .tie{fill:var(--line)}
svg .rate{fill:var(--card);stroke:var(--ink);stroke-width:1.8}
.method{margin-top:14px}
article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px 14px;margin:10px 0}
article header{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
article pre{background:var(--paper);max-height:280px;overflow:auto}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:12px}
.side{border-left:4px solid var(--line);padding-left:12px;min-width:0}.side b{overflow-wrap:anywhere}
.side.a.won{border-color:var(--a)}.side.b.won{border-color:var(--b)}
.side span{color:var(--soft);font-size:13px;white-space:nowrap}
summary{font-weight:600;margin:24px 0 8px}td summary{font-weight:400;margin:0}
"""
