"""The live view in Jupyter, without Jupyter: a kernel's shell is put in IPython's place."""

import itertools
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tuner.config import SFT, Chat, Model
from tuner.display.notebook import NotebookWatcher, in_notebook
from tuner.display.svg import POINTS_DRAWN, curve, thinned
from tuner.stages.rl.figures import figures
from tuner.stages.sft.figures import FIGURES
from tuner.training.figures import StageFigures
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
    cell = Cell()

    def display(html: Any, display_id: bool) -> Cell:
        assert display_id
        cell.update(html)
        return cell

    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(HTML=str, display=display))
    return cell


def _begun(clock: Any, figures: StageFigures = FIGURES) -> NotebookWatcher:
    watcher = NotebookWatcher(figures, clock)
    watcher.begin(Path("runs/tiny_run"), CONFIG, 0, 100)
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
    watcher.samples(1, [Sample("<script>alert(1)</script>", "<b>", "&", None, "\x1b\ud800")])
    watcher.message("<i>loss rises</i>\u202e")
    shown = cell.shown[-1]
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "&lt;i&gt;loss rises" in shown
    assert "score" not in shown
    assert not set("\x1b\ud800\u202e") & set(shown)
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
    shown = thinned(points)
    assert len(shown) <= POINTS_DRAWN
    assert shown[-1] == points[-1]
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


# PPO


PPO = figures("ppo", critic=True)


def _policy(step: int, **more: float | None) -> dict[str, float | None]:
    record = {"step": step, "loss": 0.4, "policy_loss": -0.01, "value_loss": 0.8, "score": 0.5 * step}
    record |= {"kl": 0.01 * step, "length": 212.4, "ended": 0.97, "entropy": 1.25, "explained_variance": 0.4}
    return {**record, "seconds": 12.3, **more}


def test_of_ppo_score_kl_and_gold_are_shown(cell: Cell) -> None:
    watcher = _begun(lambda: 0.0, PPO)
    for step in (1, 2, 3, 4):
        watcher.step(_policy(step, **({"eval_gold": 0.1 * step, "eval_score": 1.0} if step > 1 else {})))
    watcher.end("finished")
    shown = cell.shown[-1]
    tree = ElementTree.fromstring(shown)
    labels = [drawing.get("aria-label") for drawing in tree.iter("svg")]
    assert labels == ["score against steps", "KL against steps", "gold score against steps"]
    assert shown.count("<circle") == 3 + 3
    texts = [text for text in tree.itertext() if text.strip()]
    facts = dict(itertools.pairwise(texts))
    assert facts["gold score"] == "0.400"
    assert facts["KL"] == "0.0400"
    assert facts["answer length"] == "212"
    assert facts["ended"] == "97%"
    assert facts["explained variance"] == "0.40"
    assert facts["a step takes"] == "12 s"
    assert "loss" not in shown


def test_ppo_without_gold_and_with_missing_numbers(cell: Cell) -> None:
    watcher = _begun(lambda: 0.0, PPO)
    watcher.step(_policy(1, policy_loss=None, kl=None))
    watcher.end("interrupted")
    assert "<svg" not in cell.shown[-1], "one point makes no curve"
    assert "1 of 100 (critic warm-up)" in cell.shown[-1]
    watcher = _begun(lambda: 0.0, PPO)
    for step in (1, 2, 3):
        watcher.step(_policy(step, score=None if step == 2 else 1.0, kl=float("nan")))
    watcher.end("finished")
    assert cell.shown[-1].count("<svg") == 1
    assert "gold" not in cell.shown[-1]
    ElementTree.fromstring(cell.shown[-1])


def test_samples_have_a_column_for_conditions_only_where_there_are_some(cell: Cell) -> None:
    watcher = _begun(lambda: 0.0)
    watcher.samples(1, [Sample("p", "a", "", None, "polite"), Sample("p", "a", "", None)])
    watcher.end("finished")
    heads = [head.text for head in ElementTree.fromstring(cell.shown[-1]).iter("th")]
    assert heads == ["condition", "prompt", "answer"]
