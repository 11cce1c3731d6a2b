"""The live view in Jupyter, without Jupyter: a kernel's shell is put in IPython's place."""

import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tuner.config import SFT, Chat, Model
from tuner.training.notebook import POINTS_DRAWN, NotebookWatcher, _thinned, curve, in_notebook
from tuner.training.watchers import Sample

CONFIG = SFT(name="tiny_run", model=Model(path="tuner:tiny"), data=Chat(files=("rows.jsonl",)))


class Cell:
    """An output cell: remembers all that was displayed in it."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, html: Any) -> None:
        self.shown.append(html)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    found = Cell()

    def display(html: Any, display_id: bool) -> Cell:
        assert display_id
        found.update(html)
        return found

    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(HTML=str, display=display))
    return found


def _begun(clock: Any, total: int = 100) -> NotebookWatcher:
    watcher = NotebookWatcher(clock)
    watcher.begin(Path("runs/tiny_run"), CONFIG, 0, total)
    return watcher


def test_one_output_is_redrawn_once_a_second_and_at_the_end(cell: Cell) -> None:
    now = [0.0]
    watcher = _begun(lambda: now[0])
    for step in range(1, 101):
        now[0] = step * 0.1
        watcher.step({"step": step, "loss": 2.0, "tokens": step, "tokens_per_second": 10.0})
    watcher.end("finished")
    assert len(cell.shown) == 12  # at the beginning, ten seconds, at the end
    assert "100 of 100" in cell.shown[-1]
    assert "finished" in cell.shown[-1]
    assert "mean loss" in cell.shown[-1]


def test_what_models_and_rows_say_is_escaped(cell: Cell) -> None:
    watcher = _begun(lambda: 0.0)
    watcher.samples(1, [Sample("<script>alert(1)</script>", "<b>", "&", None)])
    watcher.message("<i>loss rises</i>")
    shown = cell.shown[-1]
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "&lt;i&gt;loss rises" in shown
    assert "score" not in shown
    ElementTree.fromstring(shown)  # every tag is closed


def test_the_curve_is_drawn_and_well_formed(cell: Cell) -> None:
    watcher = _begun(lambda: 0.0)
    for step in (1, 2, 3):
        watcher.step({"step": step, "loss": None if step == 2 else 3.0 / step, "eval_loss": 2.0})
    watcher.samples(3, [Sample("p", "a", "r", 1.0)])
    watcher.end("interrupted")
    assert cell.shown[-1].count("<polyline") == 2
    assert cell.shown[-1].count("<circle") == 3
    ElementTree.fromstring(cell.shown[-1])


def test_a_long_curve_is_thinned_and_keeps_its_last_point() -> None:
    points = [(float(step), 1.0) for step in range(1, 10_002)]
    thinned = _thinned(points)
    assert len(thinned) <= POINTS_DRAWN
    assert thinned[-1] == points[-1]
    assert len(curve(points, points, [])) < 20_000


def test_outside_jupyter_nothing_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    watcher = _begun(lambda: 0.0)
    watcher.step({"step": 1, "loss": 1.0})
    watcher.samples(1, [])
    watcher.message("a fact")
    watcher.end("finished")
    assert capsys.readouterr() == ("", "")


def test_a_shell_without_a_kernel_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = types.SimpleNamespace(get_ipython=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "IPython", terminal)
    assert not in_notebook()
