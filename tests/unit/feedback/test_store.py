"""The store: labels are neither lost nor doubled, by kills, tabs, or other processes."""

import datetime
import json
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.feedback.conftest import Clock, candidates, row
from tuner.errors import UserError
from tuner.feedback.store import Label, LabelStore


def test_a_label_by_hand(store: LabelStore, clock: Clock) -> None:
    showing = store.show("ann", "item1", "random", swapped=True)
    clock.now += 7.5
    assert store.submit("ann", showing.id, "left", "短评")
    assert store.labels() == [Label(1, "ann", "item1", True, "random", "left", "短评", 7.5, 1007.5)]
    assert store.labels()[0].decision == "second"  # the row's second answer stood on the left
    assert store.open_showing("ann") is None


def test_values_that_json_has_not_are_kept_as_texts(store: LabelStore) -> None:
    """As of a row of Parquet."""
    store.add(candidates(row(77, made=datetime.date(2026, 3, 1))).values())
    with sqlite3.connect(store.file) as database:
        ((content,),) = database.execute("SELECT content FROM items WHERE id = 'item77'")
    assert json.loads(content)["made"] == "2026-03-01"


@pytest.mark.parametrize(
    ("choice", "straight", "swapped"),
    [
        ("left", "first", "second"),
        ("right", "second", "first"),
        ("tie", "tie", "tie"),
        ("skip", None, None),
        ("unsure", None, None),
    ],
)
def test_decisions(choice, straight, swapped) -> None:
    for order, decision in ((False, straight), (True, swapped)):
        assert Label(1, "ann", "item1", order, "random", choice, "", 1.0, 1.0).decision == decision


def test_a_label_sent_twice_is_stored_once(store: LabelStore) -> None:
    showing = store.show("ann", "item1", "random", False)
    assert store.submit("ann", showing.id, "left")
    assert not store.submit("ann", showing.id, "right")
    assert [label.choice for label in store.labels()] == ["left"]


def test_a_tab_left_open_loses_and_doubles_nothing(store: LabelStore) -> None:
    old = store.show("ann", "item1", "random", False)
    new = store.show("ann", "item2", "random", False)
    assert store.submit("ann", old.id, "left")  # from the old tab: item1 has no label yet
    waiting = store.open_showing("ann")
    assert waiting is not None
    assert waiting.id == new.id
    again = store.show("ann", "item1", "random", False)
    assert not store.submit("ann", again.id, "right")
    assert store.open_showing("ann") is None
    assert [(label.item, label.choice) for label in store.labels()] == [("item1", "left")]


def test_an_old_tab_of_a_label_that_was_undone_leaves_its_pair_waiting(store: LabelStore) -> None:
    old = store.show("ann", "item1", "random", False)
    assert store.submit("ann", old.id, "left")
    assert store.has_label("ann", old.id)
    assert store.undo("ann", store.labels()[-1].id)
    assert not store.submit("ann", old.id, "right")
    assert not store.has_label("ann", old.id)
    assert store.labels() == []
    waiting = store.open_showing("ann")
    assert waiting is not None
    assert store.submit("ann", waiting.id, "right")
    assert not store.submit("ann", old.id, "left")
    assert store.has_label("ann", old.id)  # of the other showing


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "labels.sqlite"
    whole = LabelStore(file)
    whole.add(candidates(*(row(number, prompt="x" * 2000) for number in range(50))).values())
    for number in range(50):
        whole.record("ann", f"item{number}", "first", "y" * 2000)
    whole.close()
    with file.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xa5" * (file.stat().st_size - 4096))
    damaged = LabelStore(file)
    for read in (
        damaged.labels,
        lambda: damaged.verdict("ann", "item1"),
        lambda: damaged.open_showing("ann"),
    ):
        with pytest.raises(UserError, match=r"labels\.sqlite: cannot be read \(.*put a copy in its place"):
            read()
    with pytest.raises(UserError, match=r"labels\.sqlite: (nothing was stored|cannot be read)"):
        damaged.record("ann", "item1", "second")


def test_others_labels_and_repeats_are_labels_of_their_own(store: LabelStore) -> None:
    for annotator, policy in (("ann", "random"), ("bob", "random"), ("ann", "repeat")):
        assert store.submit(annotator, store.show(annotator, "item1", policy, False).id, "tie")
    assert [label.repeat for label in store.labels()] == [False, False, True]
    with pytest.raises(UserError, match="bob was never shown pair 1"):
        store.submit("bob", 1, "left")
    with pytest.raises(sqlite3.IntegrityError):
        store.submit("ann", store.show("ann", "item2", "random", False).id, "better")  # type: ignore[arg-type]


def test_undo_supersedes_and_shows_again(store: LabelStore, tmp_path: Path) -> None:
    first = store.show("ann", "item1", "random", True)
    store.submit("ann", first.id, "left")
    store.show("ann", "item2", "random", False)
    assert store.undo("ann", 1)
    assert not store.undo("ann", 1)  # sent twice
    again = store.open_showing("ann")
    assert again is not None
    assert (again.item, again.swapped) == ("item1", True)
    assert not store.submit("ann", first.id, "left")  # the form that was undone, sent again by the browser
    assert store.submit("ann", again.id, "right")
    assert not store.undo("bob", 2)
    assert [label.choice for label in store.labels()] == ["right"]
    with sqlite3.connect(tmp_path / "labels.sqlite") as database:  # nothing is deleted
        rows = database.execute("SELECT choice, superseded_at IS NULL FROM labels ORDER BY id").fetchall()
    assert rows == [("left", 0), ("right", 1)]


def test_seconds_begin_anew_at_a_reload(store: LabelStore, clock: Clock) -> None:
    showing = store.show("ann", "item1", "random", False)
    clock.now += 3600
    assert store.show_again(showing).id == showing.id
    clock.now += 4
    store.submit("ann", showing.id, "left")
    assert store.labels()[0].seconds == 4


KILLED = """
import os, sys
from pathlib import Path
from tuner.feedback.store import LabelStore
store = LabelStore(Path(sys.argv[1]))
store.submit("ann", store.show("ann", "item1", "random", False).id, "left")
showing = store.show("ann", "item2", "random", True)
with store.transaction():
    store.submit("ann", showing.id, "right")
    os.kill(os.getpid(), 9)
"""


def test_a_kill_loses_what_was_not_confirmed_and_nothing_else(store: LabelStore, tmp_path: Path) -> None:
    file = tmp_path / "labels.sqlite"
    done = subprocess.run([sys.executable, "-c", KILLED, str(file)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    after = LabelStore(file)
    assert [label.item for label in after.labels()] == ["item1"]
    waiting = after.open_showing("ann")
    assert waiting is not None
    assert (waiting.item, waiting.swapped) == ("item2", True)
    after.close()


def test_many_writers_at_once_store_each_label_once(tmp_path: Path) -> None:
    file = tmp_path / "labels.sqlite"
    with LabelStore(file).transaction():
        pass
    setup = LabelStore(file)
    setup.add(candidates(*map(row, range(10))).values())
    showings = [setup.show(f"ann{n}", f"item{n}", "random", False).id for n in range(10)]

    def send(_: int) -> int:
        own = LabelStore(file)
        stored = sum(own.submit(f"ann{n}", showing, "tie") for n, showing in enumerate(showings))
        own.close()
        return stored

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(send, range(4))) == 10
    assert len(setup.labels()) == 10
    setup.close()


def test_an_id_keeps_what_was_judged(store: LabelStore) -> None:
    store.add(candidates(row(1, guideline="other words")).values())
    with pytest.raises(UserError, match=r"candidates\.jsonl:1: id 'item1' has another prompt"):
        store.add(candidates(row(1, prompt="Another question?")).values())


def test_files_that_are_no_stores(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, " * 100)
    with pytest.raises(UserError, match="no store of labels"):
        LabelStore(tmp_path / "text")
    with pytest.raises(UserError, match="no store of labels"):
        LabelStore(tmp_path / "nowhere" / "labels.sqlite")
    with sqlite3.connect(tmp_path / "other") as database:
        database.execute("CREATE TABLE songs (name TEXT)")
    with pytest.raises(UserError, match="another kind"):
        LabelStore(tmp_path / "other")
