"""A prompt with answers to it side by side, as HTML for a page with the rules of `STYLE`."""

from __future__ import annotations

from collections.abc import Iterable

from tuner.printable import safe


def prompt_article(header: Iterable[str], prompt: str, sides: Iterable[str]) -> str:
    """A prompt below a line of facts about it, and what stands side by side below the prompt (see `side`)."""
    return (
        f"<article><header>{safe(' · '.join(header))}</header><pre>{safe(prompt)}</pre>"
        f'<div class="sides">{"".join(sides)}</div></article>'
    )


def side(name: str, facts: str, answer: str, kind: str) -> str:
    """An answer below the name of whose it is and facts about it. kind: "a" or "b", its color; with " won", shown."""
    return (
        f'<div class="side {kind}"><b>{safe(name)}</b> <span>{safe(facts)}</span>'
        f"<pre>{safe(answer) if answer.strip() else '<i>nothing</i>'}</pre></div>"
    )


STYLE = """
article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px 14px;margin:10px 0}
article header{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
article pre{background:var(--paper);max-height:280px;overflow:auto}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:12px}
.side{border-left:4px solid var(--line);padding-left:12px;min-width:0}.side b{overflow-wrap:anywhere}
.side.a.won{border-color:var(--a)}.side.b.won{border-color:var(--b)}
.side span{color:var(--soft);font-size:13px;white-space:nowrap}
"""
"""Rules of these, after those of `sheet.STYLE`."""
