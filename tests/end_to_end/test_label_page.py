"""The labeling page in Debian's chromium, driven by its WebDriver: keys, and what a row's script cannot do."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.unit.feedback.conftest import row
from tuner.feedback.candidates import read_candidates
from tuner.feedback.store import LabelStore

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="Debian's chromium and chromium-driver are not installed"
)
ATTACK = (
    "</div><script>document.title = 'attacked'</script><img src=x onerror=\"document.title = 'attacked'\">"
)
SIZES = {"wide": (1280, 900), "phone": (390, 844)}
ESCAPE = "\ue00c"
SHOWN = """
const ready = document.readyState === "complete" && typeof opened !== "undefined";
return ready && performance.now() - opened >= UNSEEN ? document.querySelector("[name=showing]").value : null"""
"""What is shown, by a script in the page; null where it takes no keys yet."""


class Browser:
    """A window, by the requests of the W3C's WebDriver."""

    def __init__(self, port: int):
        self._session = f"http://127.0.0.1:{port}/session"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        capabilities = {"goog:chromeOptions": {"binary": CHROMIUM, "args": flags}}
        started = self._send("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
        self._session += f"/{started['sessionId']}"

    def _send(self, method: str, path: str, values: dict[str, Any] | None = None) -> Any:
        body = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(self._session + path, body, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())["value"]

    def open(self, address: str) -> None:
        self._send("POST", "/url", {"url": address})

    def press(self, key: str) -> None:
        """Press a key, after the time in which the page takes none."""
        time.sleep(0.3)
        deadline = time.monotonic() + 20  # on a busy machine the next pair comes later
        while self.run(SHOWN) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self.strike(key)

    def strike(self, key: str) -> None:
        """Press a key at once."""
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._send("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def run(self, script: str) -> Any:
        """The value that a script of the test returns in the page."""
        return self._send("POST", "/execute/sync", {"script": script, "args": []})

    def emulate(self, command: str, **parameters: Any) -> None:
        """A command of Chromium's own protocol."""
        self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def screenshot(self) -> bytes:
        return base64.b64decode(self._send("GET", "/screenshot"))

    def close(self) -> None:
        self._send("DELETE", "")


def first_match(process: subprocess.Popen[str], pattern: str) -> str:
    """The first match in what a process prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(pattern, line):
            return match[1]
    raise AssertionError(f"ended without a line that has {pattern}")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def begin(*command: object) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        processes.append(
            subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)
        )
        return processes[-1]

    yield begin
    for process in processes:
        process.terminate()
        process.communicate(timeout=20)


@pytest.fixture
def browser(start: Callable[..., subprocess.Popen[str]]) -> Iterator[Browser]:
    browser = Browser(int(first_match(start(DRIVER, "--port=0"), r"successfully on port (\d+)")))
    yield browser
    browser.close()


@pytest.fixture
def address(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> str:
    """The page of 12 pairs, some with a script in their answers."""
    attacked = [{"text": f"Early {ATTACK}", "origin": "early"}, {"text": f"Late {ATTACK}", "origin": "late"}]
    values = {"condition": "brief", "guideline": "A shorter answer is better, as long as it is right."}
    rows = [row(n, **values, **({"answers": attacked} if n % 2 else {})) for n in range(12)]
    file = tmp_path / "candidates.jsonl"
    file.write_text("".join(json.dumps(values) + "\n" for values in rows))
    command = (sys.executable, "-m", "tuner", "label", file, "--name", "ann", "--port", 0)
    return first_match(start(*command), r"(http://\S+)")


def test_keys_label_and_no_script_of_a_row_runs(browser: Browser, address: str, tmp_path: Path) -> None:
    browser.open(address)
    for key in "12tus":
        label(browser, key)
        assert browser.run("return document.title").endswith("tuner label")
    browser.press("c")
    for key in ("1", "z", ESCAPE):  # text of the comment: no labels
        browser.press(key)
    for key in "21zt":
        label(browser, key)
    assert "token" not in browser.run("return location.href")

    store = LabelStore(tmp_path / "labels.sqlite")
    labels = [(label.choice, label.comment) for label in store.labels()]
    store.close()
    once = [("left", ""), ("right", ""), ("tie", ""), ("unsure", ""), ("skip", "")]
    assert labels == [*once, ("right", "1z"), ("tie", "")]


def test_240_pairs_an_hour_leave_the_time_to_their_reader(
    browser: Browser, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Of 15 s a pair the page takes at most a fifth, by keys pressed as soon as it takes them (`pytest -rP`)."""
    rows = [row(n, answers=[f"{n} {word} " * 50 for word in ("early", "late")]) for n in range(400)]
    file = tmp_path / "candidates.jsonl"
    file.write_text("".join(json.dumps(values) + "\n" for values in rows))
    store = LabelStore(tmp_path / "labels.sqlite")
    store.add(read_candidates(file).values())
    for values in rows[:200]:
        store.record("ann", values["id"], "tie", policy="import")
    command = (sys.executable, "-m", "tuner", "label", file, "--name", "ann", "--port", 0)
    browser.open(first_match(start(*command), r"(http://\S+)"))
    shown, seconds = next_pair(browser, None), list[float]()
    for number in range(20):
        began = time.monotonic()
        browser.strike("12"[number % 2])
        shown = next_pair(browser, shown)
        seconds.append(time.monotonic() - began)
    assert len(store.labels()) == 220
    store.close()
    print(f"the page takes {median(seconds):.2f} s a pair, at most {max(seconds):.2f} s")
    assert median(seconds) < 3


def label(browser: Browser, key: str) -> None:
    """Press a key that leads to another pair, and wait for it: a page that is being replaced has no title."""
    shown = next_pair(browser, None)
    browser.strike(key)
    next_pair(browser, shown)


def next_pair(browser: Browser, shown: str | None) -> str:
    """Wait until another pair takes keys."""
    deadline = time.monotonic() + 60
    while (pair := browser.run(SHOWN)) in (None, shown):
        assert time.monotonic() < deadline, f"still {pair}"
        time.sleep(0.01)
    return pair


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_in_light_and_dark(
    scheme: str, size: str, browser: Browser, address: str, tmp_path: Path
) -> None:
    width, height = SIZES[size]
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.emulate(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=1,
        mobile=size == "phone",
    )
    browser.emulate("Emulation.setEmulatedMedia", features=features)
    browser.open(address)
    for page in ("pair", "figures"):
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        brightness = browser.run(
            "return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)[0]"
        )
        assert (brightness > 128) == (scheme == "light")
        screenshot = browser.screenshot()
        if folder := os.environ.get("TUNER_SCREENSHOTS"):  # to be looked at
            Path(folder, f"{page}_{size}_{scheme}.png").write_bytes(screenshot)
        browser.open(f"{address.partition('?')[0]}figures")
