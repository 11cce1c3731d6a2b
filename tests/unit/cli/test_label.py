"""`tuner label`: the report, the export, and the server that survives being killed."""

import http.cookiejar
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.conftest import ROOT
from tests.unit.feedback.conftest import row
from tuner.cli.label import label
from tuner.errors import UserError
from tuner.feedback.candidates import read_candidates
from tuner.feedback.store import LabelStore

app = typer.Typer()
app.command()(label)

Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "candidates.jsonl"
    rows = [row(1, condition="brief"), row(2), row(3, gold=0), row(4)]
    file.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return file


@pytest.fixture
def labeled(file: Path) -> Path:
    """The file, with labels of ann beside it: item1's second answer is better, item2 is a tie, item3 as planted."""
    store = LabelStore(file.with_name("labels.sqlite"))
    store.add(read_candidates(file).values())
    for item, choice in (("item1", "right"), ("item2", "tie"), ("item3", "left")):
        store.submit("ann", store.show("ann", item, "random", False).id, choice)
    store.close()
    return file


def run(*arguments: object) -> str:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).output


def test_the_export_has_what_was_decided_and_counts_the_rest(labeled: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    said = run(labeled, "--export", output)
    (exported,) = map(json.loads, output.read_text().splitlines())
    assert exported == {
        "id": "item1",
        "prompt": "Question 1?",
        "condition": "brief",
        "chosen": "late 1",
        "rejected": "early 1",
        "weight": 1.0,
    }
    assert "1 preferences" in said
    for reason in ("1 ties", "1 planted", "1 without a decision"):
        assert reason in said


def test_the_report(labeled: Path) -> None:
    figures = json.loads(run(labeled, "--report", "--json"))
    assert figures["candidates"] == 4
    assert figures["preferences"] == 1
    everyone = figures["groups"][0]
    assert (everyone["labels"], everyone["left"], everyone["gold_accuracy"]) == (3, 0.5, 1.0)
    assert everyone["alpha"] is None
    assert "4 candidates: 1 preferences, 1 ties" in run(labeled, "--report")


def test_mistakes(labeled: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([labeled, "--json"], "--json belongs to --report"),
        ([labeled, "--export", labeled], "this file is read here"),
        ([labeled, "--export", tmp_path / "labels.sqlite"], "this file is read here"),
        ([labeled, "--name", " "], "--name is empty"),
        ([labeled, "--order", "nearest"], r"candidates\.jsonl:1: .* needs .scores. of at least 1"),
        ([labeled, "--store", tmp_path], "no store of labels"),
        ([tmp_path / "none.jsonl"], "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments)
    assert len(labeled.read_text().splitlines()) == 4
    assert CliRunner().invoke(app, [str(labeled), "--order", "best"]).exit_code == 2


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the command in a process; returns it and the address that it prints."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*arguments: object) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuner", "label", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address is not None
        return process, address[0]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


class Visitor:
    """A browser without scripts: cookies, redirects, and the hidden fields of the page's forms."""

    def __init__(self, address: str):
        jar = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self._opener = urllib.request.build_opener(jar)
        self._home = re.match(r"http://[^/]+", address)[0]  # type: ignore[index]
        self.text = self._opener.open(address).read().decode()

    def choose(self, choice: str) -> None:
        fields = dict(re.findall(r'name="(token|showing)" value="(.*?)"', self.text))
        form = urllib.parse.urlencode({**fields, "choice": choice}).encode()
        request = urllib.request.Request(f"{self._home}/label", form, {"Origin": self._home})
        self.text = self._opener.open(request).read().decode()


def test_labels_survive_a_kill_and_ctrl_c_ends_in_order(file: Path, start: Start) -> None:
    process, address = start(file, "--name", "ann", "--port", 0)
    assert re.match(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}$", address)
    visitor = Visitor(address)
    visitor.choose("left")
    waiting = re.findall("<article>.*</article>", visitor.text)
    process.kill()
    process.wait()

    process, address = start(file, "--name", "ann", "--port", 0)
    visitor = Visitor(address)
    assert "<b>1</b> labeled, 3 left" in visitor.text
    assert re.findall("<article>.*</article>", visitor.text) == waiting
    visitor.choose("tie")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(address.partition("?")[0])
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "2 labels of ann" in output


def test_a_port_in_use_is_named(file: Path, start: Start) -> None:
    _, address = start(file, "--name", "ann", "--port", 0)
    port = re.search(r":(\d+)/", address)[1]  # type: ignore[index]
    with pytest.raises(UserError, match=f"--port {port}: cannot be used"):
        run(file, "--name", "bob", "--port", port)
