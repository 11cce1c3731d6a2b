"""What `tuner data` shows, in a terminal and as a page."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tests.unit.data.conftest import chat
from tuner.config.data import Chat
from tuner.data.data_report import DataReport
from tuner.data.inspection import statistics
from tuner.data.load_examples import load_examples
from tuner.display.data_page import data_html
from tuner.display.data_terminal import data_terminal


@pytest.fixture
def loaded(write, tokenizer):
    rows = [chat("<script>alert(1)</script>", "外滩 & 豫园 🙂"), chat("Two?", "2"), chat("Three?", "3")]
    return load_examples(Chat(files=(write("a.jsonl", *rows),), template="chatml"), tokenizer)


def printed(shown, **console) -> str:
    screen = Console(width=200, color_system=None, **console)
    with screen.capture() as captured:
        screen.print(shown)
    return captured.get()


def test_plain_marks_stand_around_what_the_loss_is_taken_on(loaded, tokenizer):
    text = printed(data_terminal(loaded.train, tokenizer, report=loaded.report, color=False))
    assert "⟦外滩 & 豫园 🙂<|im_end|>⟧⏎" in text
    assert "⟦2<|im_end|>⟧⏎" in text
    assert "a.jsonl:2 · " in text
    assert "positions 0–" in text


def test_colors_are_there_and_marks_are_not(loaded, tokenizer):
    screen = Console(width=200, force_terminal=True, color_system="standard")
    with screen.capture() as captured:
        screen.print(data_terminal(loaded.train, tokenizer))
    assert "⟦" not in captured.get()
    assert "\x1b[30;42m" in captured.get()


def test_passes_show_segments_and_where_they_begin(loaded, tokenizer):
    passes = [[2, 0], [1]]
    text = printed(data_terminal(loaded.train, tokenizer, passes=passes, color=False, tokens_per_pass=200))
    begin = loaded.train.lengths[2]
    assert "pass 1 of 2: 2 segments" in text
    assert f"(from {begin} in the pass)" in text
    tokens = int(loaded.train.lengths.sum())
    assert f"mean fill{tokens / 400:>20.1%}".split() == next(
        line.split() for line in text.splitlines() if "mean fill" in line
    )


def test_the_fill_of_a_single_pass_is_measured_by_its_room(loaded):
    tokens = int(loaded.train.lengths[0])
    assert ("mean fill", "50.0%") in statistics(loaded.train, passes=[[0]], tokens_per_pass=2 * tokens)
    assert not [name for name, _ in statistics(loaded.train, passes=[[0]]) if name == "mean fill"]


class Tags(HTMLParser):
    """Collects tags, and the text of them all."""

    def __init__(self):
        super().__init__()
        self.opened, self.closed, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.opened.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag):
        self.closed.append(tag)


def test_html_is_self_contained_balanced_and_escaped(loaded, tokenizer):
    page = data_html(loaded.train, tokenizer, passes=[[0, 1], [2]], report=loaded.report, title="<x> & y")
    tags = Tags()
    tags.feed(page)
    empty = {"meta"}
    assert sorted(tag for tag in tags.opened if tag not in empty) == sorted(tags.closed)
    assert "script" not in tags.opened
    assert not {"src", "href", "onload"} & set(tags.attributes)
    assert "http" not in page
    assert "&lt;x&gt; &amp; y" in page
    assert "prefers-color-scheme:dark" in page
    assert "外" in page
    assert "Nothing wrong was found" in page


HOSTILE = "<b>\x1b[2J\u202e\ud800"
SHOWN = r"\x1b[2J\u202e\ud800"


def hostile_report(loaded) -> DataReport:
    sources = [replace(source, path=HOSTILE, cut=1) for source in loaded.report.sources]
    return replace(loaded.report, sources=sources, notes=[*loaded.report.notes, HOSTILE])


def test_labels_names_and_notes_do_not_command_the_terminal(loaded, tokenizer):
    text = printed(
        data_terminal(
            loaded.train, tokenizer, report=hostile_report(loaded), color=False, label=lambda index: HOSTILE
        )
    )
    assert not re.search("[\x1b\u202e\ud800]", text)
    assert text.count(f"<b>{SHOWN}") == 3 + 2  # a label for each sample, the note, and the source's name


def test_a_page_is_escaped_as_a_terminal_is(write, tokenizer):
    rows = [chat("\x1b[2J\u202e", "ok\x9b"), chat("Two?", "2")]
    loaded = load_examples(Chat(files=(write("a.jsonl", *rows),), template="chatml"), tokenizer)
    page = data_html(
        loaded.train,
        tokenizer,
        passes=[[0, 1]],
        report=hostile_report(loaded),
        title=HOSTILE,
        label=lambda index: HOSTILE,
    )
    page.encode()  # a lone surrogate could not be written
    assert not re.search("[\x1b\x9b\u202e\ud800]", page)
    assert "<b>\\x1b" not in page
    assert page.count(f"&lt;b&gt;{SHOWN}") >= 6


def test_control_characters_of_a_row_do_not_reach_the_terminal(write, tokenizer):
    loaded = load_examples(
        Chat(files=(write("a.jsonl", chat("\x1b[2J\x07", "ok\x9b")),), template="chatml"), tokenizer
    )
    text = printed(data_terminal(loaded.train, tokenizer, color=False))
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert r"\x1b[2J\x07" in text
