"""The report card for people: one page that needs nothing else, and lines in the terminal; hostile texts stay texts."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from tests.unit.evaluation.report.test_card import BLANK, GOOD, NINE, card_of, make_pairs, plain, twin_pairs
from tuner.display.card_page import html, terminal
from tuner.display.panels import BLUE, ORANGE
from tuner.evaluation.report_card.card import ReportCard
from tuner.evaluation.report_card.pairs import PairText

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e\ud800"
SHOWN = "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;\\x1b[31m\\u202e\\ud800"


class Page(HTMLParser):
    """Tags that are open, all that were, and the text; complains about a tag closed out of turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def lines(card: ReportCard, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(terminal(card))
    return console.file.getvalue()


def full_card(text: str = "a text", **fields) -> ReportCard:
    seen = twin_pairs(GOOD, **fields)
    swapped = twin_pairs([(-a, -b) for a, b in GOOD], **fields)
    return card_of(
        seen,
        {"blank": twin_pairs(BLANK, **fields), "swapped": swapped},
        texts=lambda index: PairText(text, text, text * 9, text, f"test.jsonl:{index}"),
    )


CARDS = {
    "full": full_card(),
    "no rows": card_of(make_pairs([])),
    "one pair": card_of(make_pairs([1.0])),
    "one tie without bounds": card_of(make_pairs([0.0]), bound=None),
    "no conditions": card_of(plain(60, 40)),
    "empty answers": card_of(plain(6, 4, chosen_tokens=np.zeros(10), rejected_tokens=np.zeros(10))),
    "far scores": card_of(make_pairs([1e9, -1e9, 1e-9])),
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
def test_a_page_needs_nothing_else_and_is_whole(card):
    page = html(card, "a title")
    parsed = Page(page)
    assert parsed.open == []
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?:|url\(|@import|\bsrc=|href=", page)
    assert not re.search(r"\b(nan|inf)\b", page, re.IGNORECASE)
    assert "prefers-color-scheme:dark" in page
    assert BLUE in page
    assert ORANGE in page
    for tag, attributes in parsed.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_and_say_the_verdict(card, width):
    text = lines(card, width)
    assert max(len(line) for line in text.splitlines()) <= width
    flat = " ".join(text.split())
    assert all(" ".join(sentence.split()) in flat for sentence in card.verdict)
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)


def test_page_shows_every_figure_and_plot():
    page = html(full_card(), "Report card of 0007")
    text = " ".join(Page(page).text.split())
    for figure in ("Report card of 0007", "Nothing wrong was found.", "0.909", "0.818", "220"):
        assert figure in text
    plots = ["Controls", "Accuracy by condition", "Reliability, calibration error 0.009"]
    plots += [
        "Scores of better and worse answers",
        "Mean score by length of the answer",
        "Accuracy and length",
    ]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == plots
    assert "bound −5" in text
    assert "bound +5" in text
    assert "Without a condition exactly half of them are right, and no twins both." in text
    assert "perfectly calibrated" in text


def test_bars_and_whiskers_are_where_the_numbers_are():
    # bars run from x = 148 (0) to 448 (1): 0.5 is 150 pixels wide, its interval on 220 rows is 0.434 to 0.566
    page = html(full_card(), "t")
    bar = page.split("<title>blank:")[1]
    assert re.search(r'class="a area" x="148" y="[\d.]+" width="150.0"', bar)
    low, high = re.search(r'class="whisker" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', bar).groups()
    assert (float(low), float(high)) == pytest.approx((148 + 300 * 0.4345, 148 + 300 * 0.5655), abs=0.2)
    assert re.search(r'class="chance" x1="298.0" y1="[\d.]+" x2="298.0"', page)


def test_verdict_comes_first():
    page = html(card_of(plain(100, 100)), "t")
    assert "This reward model fails:" in page
    assert page.index("No better than chance") < page.index("<figure>")
    sentences = lines(card_of(plain(100, 100))).splitlines()
    assert sentences[0] == "This reward model fails:"
    assert sentences[1].startswith("- No better than chance")
    assert "Nothing fails, but mind:" in html(card_of(plain(150, 50)), "t")


@pytest.mark.parametrize("where", ["title", "texts", "conditions", "sources"])
def test_hostile_texts_stay_texts_in_a_page(where):
    fields = {}
    if where == "conditions":
        fields = {"conditions": (HOSTILE, "b") * 110}
    if where == "sources":
        fields = {"sources": (HOSTILE,) * 220}
    card = full_card(HOSTILE if where == "texts" else "a text", **fields)
    page = html(card, HOSTILE if where == "title" else "t")
    assert SHOWN in page
    assert "<script" not in page
    assert not re.search("[\x1b\u202e\ud800]", page)
    assert Page(page).open == []
    page.encode()  # a lone surrogate could not be written


def test_hostile_condition_names_stay_texts_in_the_verdict():
    card = card_of(plain(100, 100, conditions=(HOSTILE,) * 200))
    assert f"Condition {SHOWN} is no better" in html(card, "t")


def test_hostile_texts_do_not_steer_the_terminal():
    text = lines(
        full_card(HOSTILE + "\r\n[bold]x[/bold]", conditions=(HOSTILE, "b") * 110, sources=(HOSTILE,) * 220)
    )
    assert not re.search("[\x1b\u202e\ud800\r]", text)
    assert "\\x1b[31m" in text
    assert "[bold]x[/bold]" in text  # no markup of rich
    at_chance = lines(card_of(plain(100, 100, conditions=(HOSTILE,) * 200)))
    assert not re.search("[\x1b\u202e\ud800]", at_chance)
    assert "\\u202e\\ud800 is no better than chance" in " ".join(at_chance.split())


def test_long_texts_are_folded():
    page = html(full_card("word " * 30), "t")
    assert page.count("<details><summary>word word") >= 3
    assert f"<pre>{'word ' * 30}</pre>" in page
    assert "<td>short</td>" in html(full_card("short"), "t")


def test_parts_that_are_absent_are_not_shown():
    page = html(CARDS["no conditions"], "t")
    assert "twins both right</span>" not in page
    assert "Accuracy of each condition" not in page
    assert "prompt cut" not in page
    assert "<figure" not in html(CARDS["no rows"], "t")
    assert "bound −5" not in html(CARDS["one tie without bounds"], "t")
    cut = card_of(plain(6, 4, cut=[True] * 3 + [False] * 7))
    assert "prompt cut" in html(cut, "t")


def test_texts_take_a_line_each_in_the_terminal():
    shown = lines(full_card("word\nword " * 30), 80).split("Worst pairs")[1].splitlines()
    prompts = [line for line in shown if line.startswith("  prompt")]
    assert len(prompts) == 5
    assert all("word⏎word" in line and line.endswith("…") and len(line) <= 80 for line in prompts)


def test_terminal_tells_how_many_worst_pairs_there_are():
    card = card_of(plain(100, 12))
    assert "and 7 more" in lines(card)
    assert lines(card).count("margin −2.197") == 5
    assert "more" not in lines(card_of(make_pairs([NINE] * 100 + [-NINE] * 5))).split("Worst pairs")[1]
