"""What `tuner data` shows and what it finds wrong."""

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from tests.unit.data.conftest import chat
from tuner.config.data import Chat, Text
from tuner.data.dataset import load_data
from tuner.display import data_view as view


@pytest.fixture
def loaded(write, tokenizer):
    rows = [chat("<script>alert(1)</script>", "外滩 & 豫园 🙂"), chat("Two?", "2"), chat("Three?", "3")]
    return load_data(Chat(files=(write("a.jsonl", *rows),), template="chatml"), tokenizer)


def printed(shown, **console) -> str:
    screen = Console(width=200, color_system=None, **console)
    with screen.capture() as captured:
        screen.print(shown)
    return captured.get()


def test_plain_marks_stand_around_what_is_learned(loaded, tokenizer):
    text = printed(view.terminal(loaded.train, tokenizer, report=loaded.report, color=False))
    assert "⟦外滩 & 豫园 🙂<|im_end|>⟧⏎" in text
    assert "⟦2<|im_end|>⟧⏎" in text
    assert "a.jsonl:2 · " in text
    assert "positions 0–" in text


def test_colors_are_there_and_marks_are_not(loaded, tokenizer):
    screen = Console(width=200, force_terminal=True, color_system="standard")
    with screen.capture() as captured:
        screen.print(view.terminal(loaded.train, tokenizer))
    assert "⟦" not in captured.get()
    assert "\x1b[30;42m" in captured.get()


def test_pieces_join_to_the_text_and_split_no_character(loaded, tokenizer):
    for index in range(len(loaded.train)):
        pieces = list(view.pieces(loaded.train, index, tokenizer))
        tokens, weights = loaded.train.example(index)
        assert [token for piece in pieces for token in piece.ids] == tokens.tolist()
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(tokens)
        assert all(weights[piece.position] == piece.weight for piece in pieces)


def test_passes_show_segments_and_where_they_begin(loaded, tokenizer):
    text = printed(view.terminal(loaded.train, tokenizer, passes=[[2, 0], [1]], color=False))
    begin = loaded.train.lengths[2]
    assert "pass 1 of 2: 2 segments" in text
    assert f"(from {begin} in the pass)" in text
    assert "mean fill" in text


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
    page = view.html(loaded.train, tokenizer, passes=[[0, 1], [2]], report=loaded.report, title="<x> & y")
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


def test_control_characters_of_a_row_do_not_reach_the_terminal(write, tokenizer):
    loaded = load_data(
        Chat(files=(write("a.jsonl", chat("\x1b[2J\x07", "ok\x9b")),), template="chatml"), tokenizer
    )
    text = printed(view.terminal(loaded.train, tokenizer, color=False))
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert r"\x1b[2J\x07" in text


def test_findings(loaded, tokenizer, write):
    train = loaded.train
    assert view.findings(train, tokenizer, loaded.report) == []
    nothing = train.weights_T.copy()
    nothing[train.offsets[1] : train.offsets[2]] = 0
    (found,) = view.errors(replace(train, weights_T=nothing), tokenizer)
    assert found.startswith("1 sample teach nothing")
    assert "a.jsonl:2" in found
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (found,) = view.errors(
        replace(train, weights_T=np.where(train.tokens_T == end, 0, train.weights_T)), tokenizer
    )
    assert "3 samples have a learned part without an end token" in found
    tokens = train.tokens_T.copy()
    tokens[train.offsets[2] + 1] = tokenizer.bos_token_id
    (found,) = view.errors(replace(train, tokens_T=tokens), tokenizer)
    assert "begin with BOS twice" in found
    assert "a.jsonl:3" in found
    tokens = np.where(train.tokens_T == train.tokens_T[3], tokenizer.unk_token_id, train.tokens_T)
    assert "unknown tokens" in view.notices(replace(train, tokens_T=tokens), tokenizer)[0]


def test_nothing_is_found_in_what_is_right(write, tokenizer):
    every = load_data(
        Chat(files=(write("a.jsonl", chat("a", "b")),), template="chatml", learn="all"), tokenizer
    )
    assert view.errors(every.train, tokenizer, every.report) == []
    text = write("b.jsonl", {"text": "word " * 100}, {"text": "short"})
    split = load_data(Text(files=(text,), max_length=32), tokenizer)
    assert view.errors(split.train, tokenizer, split.report) == []
    cut = load_data(
        Chat(
            files=(write("c.jsonl", chat("a", "word " * 100)),),
            template="chatml",
            max_length=32,
            too_long="cut",
        ),
        tokenizer,
    )
    assert view.errors(cut.train, tokenizer, cut.report) == []
    assert "1 rows were cut at max_length" in view.notices(cut.train, tokenizer, cut.report)[0]
