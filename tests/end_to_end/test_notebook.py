"""docs/quickstart.ipynb runs from top to bottom in a kernel, shows what it promises, and can be interrupted."""

import os
import re
from html import unescape
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.end_to_end.conftest import PRECISION_NOTES

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel", reason="a notebook needs a kernel: pip install '.[notebook]'")

FILE = ROOT / "docs" / "quickstart.ipynb"

SHORTER = ('"evaluation.rows": 100', '"evaluation.rows": 4, "max_steps": 20')
"""The minute of training that the notebook takes is a test of its own: `make quickstart`."""

INTERRUPTED = """
import os, signal
from tuner.training.step import Step

config = tuner.override(config, {"name": "interrupted", "max_steps": 8, "evaluation.rows": 2})
finish = Step.finish
def watched(step):
    if step.index == 3:
        os.kill(os.getpid(), signal.SIGINT)  # what the notebook's stop button sends
    finish(step)
Step.finish = watched
run = tuner.train(config)
Step.finish = finish
stopped = len(run.metrics), run.results is None, len(list(run.checkpoints_folder.iterdir()))
run = tuner.train(config)
stopped, len(run.metrics), run.results is None
"""
"""A cell behind the notebook's own: interrupt = checkpoint, and once more goes on."""


def test_it_is_stored_without_outputs() -> None:
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cells by their source, executed in an empty folder."""
    notebook = nbformat.read(FILE, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(*SHORTER)
    notebook.cells.append(nbformat.v4.new_code_cell(INTERRUPTED))
    folder = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("IPYTHONDIR", str(folder / ".ipython"))
        client.execute(env=dict(os.environ))  # raises CellExecutionError, with the cell and its traceback
    if kept := os.environ.get("TUNER_KEEP_NOTEBOOK"):
        nbformat.write(notebook, kept)
    assert any(SHORTER[1] in cell.source for cell in notebook.cells)
    assert (folder / "runs/notebook/results.json").is_file()
    return {cell.source: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def outputs(executed: dict[str, Any], part: str) -> list[Any]:
    """Of the first cell that holds this text; without the hint that ipywidgets would be nice to have."""
    found = next(found for source, found in executed.items() if part in source)
    return [output for output in found if "IProgress not found" not in output.get("text", "")]


def html(found: list[Any]) -> str:
    (output,) = found
    return output["data"]["text/html"]


def test_nothing_is_written_to_stderr_by_libraries(executed: dict[str, Any]) -> None:
    shown = [output for source in executed for output in outputs(executed, source)]
    assert [output["text"] for output in shown if output.get("name") == "stderr"] == []


def test_the_config_is_a_table(executed: dict[str, Any]) -> None:
    table = html(outputs(executed, "load_config"))
    assert "<table>" in table
    assert "optimizer.lr" in table
    assert "Peak learning rate." in table


def test_a_wrong_name_says_what_was_meant(executed: dict[str, Any]) -> None:
    (said,) = outputs(executed, "optimizer.rl")
    assert "AdamW has no field 'rl'" in said["text"]
    assert "did you mean 'lr'?" in said["text"]


def test_the_data_stand_in_a_frame_of_their_own(executed: dict[str, Any]) -> None:
    frame = html(outputs(executed, "view_data"))
    assert frame.startswith("<iframe sandbox ")
    page = unescape(re.findall(r'srcdoc="([^"]*)"', frame)[0])
    assert page.startswith("<!doctype html>")
    assert '<span class="l' in page


def test_the_live_display_ends_as_a_curve(executed: dict[str, Any]) -> None:
    """One display, updated in place: table, bar and curve of all steps."""
    shown_outputs = outputs(executed, "run = tuner.train(config)")
    notes = [f"{note}\n" for note in PRECISION_NOTES]
    rows, *displays = [output for output in shown_outputs if output.get("text") not in notes]
    assert "rows read from" in rows["text"]
    shown = html(displays)
    assert "20 of 20" in shown
    assert "finished" in shown
    assert shown.count("<svg") == 1
    line = re.findall(r'points="([^"]*)"', shown)[0]
    assert len(line.split()) == 20


def test_results_picture_and_answers(executed: dict[str, Any]) -> None:
    (results,) = outputs(executed, "run.results")
    assert "'before'" in results["data"]["text/plain"]
    (picture,) = outputs(executed, "run.plot()")
    assert picture["data"]["image/png"].startswith("iVBORw0KGgo"), "a PNG in base64"
    said = "".join(output["text"] for output in outputs(executed, "run.chat("))
    for question in ("What is 23 + 45?", "What is 61 + 17?", "Please work out 36 + 36."):
        assert re.search(rf"^{re.escape(question)} +\S", said, re.MULTILINE), said


def test_an_interrupt_is_a_checkpoint(executed: dict[str, Any]) -> None:
    (result,) = (
        output for output in outputs(executed, "SIGINT") if output["output_type"] == "execute_result"
    )
    assert result["data"]["text/plain"] == "((4, True, 1), 8, False)"
