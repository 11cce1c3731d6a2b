"""The frame of every HTML page: one file that loads nothing else, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable

from tuner.printable import safe


def page(title: str, style: str, blocks: Iterable[str]) -> str:
    """A whole page of HTML.

    title: plain text. style: the page's rules beside those of all pages, which it may override. blocks: HTML, in order.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title><style>{_STYLE}{style}</style></head><body><main>\n"
        + "\n".join(blocks)
        + "\n</main></body></html>\n"
    )


def figure_boxes(figures: Iterable[tuple[str, str]]) -> str:
    """(value, name) of a page's main figures, as a row of boxes."""
    boxes = (f"<div><b>{safe(value)}</b><span>{safe(name)}</span></div>" for value, name in figures)
    return f'<div class="figures">{"".join(boxes)}</div>'


_STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf8;--card:#fff;--ink:#1d1d1f;--soft:#66666e;--line:#e4e2dd;
--red:#a3201a;--redback:#fdeceb;--amber:#6e4a00;--amberback:#fdf4e0;--green:#0c4a21;--greenback:#d9f2df}
@media(prefers-color-scheme:dark){:root{--paper:#141416;--card:#1c1c20;--ink:#e9e9ec;--soft:#a2a2ab;--line:#34343b;
--red:#ff9d95;--redback:#3b1a18;--amber:#f0c674;--amberback:#352a14;--green:#d3f5dc;--greenback:#174a2a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:24px;margin:0 0 16px;font-weight:650;overflow-wrap:anywhere}
h2{font-size:16px;margin:32px 0 4px;font-weight:650}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(156px,1fr));gap:10px;margin:18px 0}
.figures div,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px}
.figures b{display:block;font-size:21px;font-weight:600;font-variant-numeric:tabular-nums}
.figures span{color:var(--soft);font-size:13px}
"""
