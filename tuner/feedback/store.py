"""The labels of people and of programs: one SQLite file, from which nothing is ever deleted.

Every showing of a pair to an annotator is a row, and a label belongs to one showing. That a form sent twice, or from
two tabs, stores one label is the database's own rule (its unique indexes), not the page's.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tuner.errors import UserError
from tuner.feedback.candidates import Candidate, Decision, read_candidate

Choice = Literal["left", "right", "tie", "skip", "unsure"]
"""What an annotator says of a pair, by the sides it was shown on."""
CHOICES: tuple[Choice, ...] = get_args(Choice)
Order = Literal["random", "nearest", "disagreement"]
"""How pairs follow each other: at random, those first whose answers reward models score most alike on average, or
those first about which reward models differ most."""
Policy = Literal[Order, "repeat", "adjudication", "machine", "import"]
"""Why a pair was shown: in its turn of an order, once more to the same annotator, or to settle a disagreement; or that
no page of ours showed it: a program judged it, or another tool's annotator."""
Verdict = Decision | Literal["skip", "unsure"]
"""What an annotator says of a pair, by the row's order of answers."""

_CHOICES: dict[Verdict, Choice] = {"first": "left", "second": "right"}
_VERSION = 1
_WAIT = 30.0
"""Seconds to wait for another process that writes."""
_WAY_OUT = "try again, and put a copy in its place where it is damaged"
_BUGS = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.NotSupportedError)
"""Errors of SQLite that a file cannot cause."""
_SCHEMA = """
CREATE TABLE items (id TEXT PRIMARY KEY, content TEXT NOT NULL);
CREATE TABLE showings (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    annotator TEXT NOT NULL,
    item TEXT NOT NULL REFERENCES items (id),
    swapped INTEGER NOT NULL,
    policy TEXT NOT NULL,
    shown_at REAL NOT NULL,
    is_open INTEGER NOT NULL
);
CREATE UNIQUE INDEX one_open_showing ON showings (annotator) WHERE is_open;
CREATE TABLE labels (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    showing INTEGER NOT NULL UNIQUE REFERENCES showings (id),
    annotator TEXT NOT NULL,
    item TEXT NOT NULL REFERENCES items (id),
    repeat INTEGER NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'skip', 'unsure')),
    comment TEXT NOT NULL,
    seconds REAL NOT NULL,
    labeled_at REAL NOT NULL,
    superseded_at REAL
);
CREATE UNIQUE INDEX one_label ON labels (annotator, item, repeat) WHERE superseded_at IS NULL;
"""


@dataclass(frozen=True, slots=True)
class Showing:
    """A pair put before an annotator."""

    id: int
    annotator: str
    item: str
    swapped: bool
    """Whether the row's second answer stands on the left."""
    policy: Policy
    shown_at: float
    """Seconds since 1970; of the last time where it was shown again, as after a reload."""


@dataclass(frozen=True, slots=True)
class Label:
    """A label that stands: neither undone nor replaced."""

    id: int
    annotator: str
    item: str
    swapped: bool
    policy: Policy
    choice: Choice
    comment: str
    seconds: float
    """From the pair's last showing to its label."""
    labeled_at: float
    """Seconds since 1970."""

    @property
    def repeat(self) -> bool:
        """Whether it is the annotator's second label of the pair."""
        return self.policy == "repeat"

    @property
    def by_machine(self) -> bool:
        """Whether a program gave it, such as a judge."""
        return self.policy == "machine"

    @property
    def on_page(self) -> bool:
        """Whether it was given on our page, which draws the order of answers at random and takes the time."""
        return self.policy not in ("machine", "import")

    @property
    def decision(self) -> Decision | None:
        """The choice by the row's order of answers; None where it is no decision (skip, unsure)."""
        if self.choice == "tie":
            return "tie"
        if self.choice not in ("left", "right"):
            return None
        return "first" if (self.choice == "left") != self.swapped else "second"

    @property
    def verdict(self) -> Verdict:
        """The choice by the row's order of answers."""
        return self.decision or ("skip" if self.choice == "skip" else "unsure")


_LABELS = """
SELECT labels.id, labels.annotator, labels.item, swapped, policy, choice, comment, seconds, labeled_at
FROM labels JOIN showings ON showings.id = labels.showing WHERE superseded_at IS NULL
"""
_SHOWINGS = "SELECT id, annotator, item, swapped, policy, shown_at FROM showings "


def _labels(rows: Iterable[Any]) -> list[Label]:
    return [
        Label(number, annotator, item, bool(swapped), *others)
        for number, annotator, item, swapped, *others in rows
    ]


class LabelStore:
    """The labels of all annotators of a set of candidates. Safe against kills, and against other processes' writes.

    clock: seconds since 1970. Raises UserError when the file cannot be opened or is not a store of labels.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.time):
        self.file, self._clock = file, clock
        try:
            # check_same_thread: a server may run in another thread than opened the file, but uses one at a time
            self._database = sqlite3.connect(
                file, timeout=_WAIT, isolation_level=None, check_same_thread=False
            )
            self._prepare()
        except sqlite3.Error as error:
            raise UserError(
                f"{file}: no store of labels can be opened there ({error}); name another --store"
            ) from error

    def _prepare(self) -> None:
        """Create the tables in a new file. WAL: who reads a report does not wait for who labels."""
        self._database.execute("PRAGMA journal_mode = WAL")
        # a label that was confirmed survives a power cut, too
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("PRAGMA foreign_keys = ON")
        with self.transaction():
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            tables = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version != _VERSION and tables:
                raise UserError(
                    f"{self.file}: a database of another kind, or of another version of tuner; name another --store"
                )
            if not tables:
                for statement in _SCHEMA.split(";"):  # executescript would commit the transaction
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {_VERSION}")

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block is stored or none of it, and no other process writes in between; may be nested.

        Raises UserError when the file cannot be written.
        """
        if self._database.in_transaction:
            yield
            return
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield
            self._database.execute("COMMIT")
        except (
            sqlite3.DatabaseError
        ) as error:  # a full disk, another process that writes on and on, damaged pages
            if isinstance(error, _BUGS):
                raise
            raise UserError(f"{self.file}: nothing was stored ({error}); {_WAY_OUT}") from error
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def _rows(self, query: str, *values: object) -> list[Any]:
        """What a query gives. Raises UserError when the file cannot be read."""
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            if isinstance(error, _BUGS):
                raise
            raise UserError(f"{self.file}: cannot be read ({error}); {_WAY_OUT}") from error

    def add(self, candidates: Iterable[Candidate]) -> None:
        """Store candidates. Raises UserError where an id already has another prompt, condition or pair of answers."""
        with self.transaction():
            for candidate in candidates:
                # values that JSON does not have (Parquet's dates) become texts
                content = json.dumps(dict(candidate.row), ensure_ascii=False, default=str)
                stored = self._database.execute(
                    "SELECT content FROM items WHERE id = ?", (candidate.id,)
                ).fetchone()
                if (
                    stored
                    and read_candidate(json.loads(stored[0]), str(self.file)).judged() != candidate.judged()
                ):
                    raise UserError(
                        f"{candidate.origin}: id {candidate.id!r} has another prompt, condition or answers in "
                        f"{self.file}; give the row another id, or name another --store"
                    )
                self._database.execute(
                    "INSERT INTO items VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET content = excluded.content",
                    (candidate.id, content),
                )

    # showings

    def open_showing(self, annotator: str) -> Showing | None:
        """The pair that waits for the annotator's label."""
        rows = self._showings("WHERE annotator = ? AND is_open", annotator)
        return rows[0] if rows else None

    def waiting(self, since: float) -> list[Showing]:
        """The pairs before all annotators now, shown in the last `since` seconds."""
        return self._showings("WHERE is_open AND shown_at >= ?", self._clock() - since)

    def show(self, annotator: str, item: str, policy: Policy, swapped: bool) -> Showing:
        """Put a pair before an annotator, in place of the one that waits."""
        with self.transaction():
            self.withdraw(annotator)
            cursor = self._database.execute(
                "INSERT INTO showings (annotator, item, swapped, policy, shown_at, is_open) VALUES (?, ?, ?, ?, ?, 1)",
                (annotator, item, swapped, policy, self._clock()),
            )
            return self._showings("WHERE id = ?", cursor.lastrowid)[0]

    def show_again(self, showing: Showing) -> Showing:
        """The same pair after a reload: its seconds begin anew."""
        with self.transaction():
            self._database.execute(
                "UPDATE showings SET shown_at = ? WHERE id = ?", (self._clock(), showing.id)
            )
            return self._showings("WHERE id = ?", showing.id)[0]

    def earlier_comment(self, showing: Showing) -> str:
        """The comment of the label that was undone before this showing; "" without one."""
        rows = self._rows(
            "SELECT comment FROM labels WHERE annotator = ? AND item = ? AND repeat = ? ORDER BY id DESC LIMIT 1",
            showing.annotator,
            showing.item,
            showing.policy == "repeat",
        )
        return rows[0][0] if rows else ""

    def withdraw(self, annotator: str) -> None:
        """Take back the pair that waits for an annotator."""
        with self.transaction():
            self._database.execute(
                "UPDATE showings SET is_open = 0 WHERE annotator = ? AND is_open", (annotator,)
            )

    def _showings(self, where: str, *values: object) -> list[Showing]:
        rows = self._rows(_SHOWINGS + where, *values)
        return [
            Showing(number, annotator, item, bool(swapped), policy, shown_at)
            for number, annotator, item, swapped, policy, shown_at in rows
        ]

    # labels

    def labels(self) -> list[Label]:
        """All labels that stand, in the order they were given."""
        return _labels(self._rows(_LABELS + "ORDER BY labels.id"))

    def submit(self, annotator: str, showing: int, choice: Choice, comment: str = "") -> bool:
        """Store the label of a showing; False, and nothing stored, where the showing or its pair already has one.

        A showing that waits no more, as in a tab that was left open, still takes its label, unless it had one that was
        undone: then its pair goes on waiting. Raises UserError for a showing that this annotator never had.
        """
        with self.transaction():
            shown = self._showings("WHERE id = ? AND annotator = ?", showing, annotator)
            if not shown:
                raise UserError(f"{annotator} was never shown pair {showing}; load the page again")
            item, repeat, now = shown[0].item, shown[0].policy == "repeat", self._clock()
            cursor = self._database.execute(
                "INSERT INTO labels (showing, annotator, item, repeat, choice, comment, seconds, labeled_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (showing, annotator, item, repeat, choice, comment, max(0.0, now - shown[0].shown_at), now),
            )
            is_stored = cursor.rowcount == 1
            # the same pair may wait in another showing, where this one was left open in a tab
            if is_stored or self.has_label(annotator, showing):
                self._database.execute(
                    "UPDATE showings SET is_open = 0 WHERE annotator = ? AND item = ? AND (policy = 'repeat') = ?",
                    (annotator, item, repeat),
                )
            return is_stored

    def has_label(self, annotator: str, showing: int) -> bool:
        """Whether a label stands of the pair that was shown, from this showing or another; not where it was undone."""
        rows = self._rows(
            "SELECT 1 FROM labels JOIN showings ON showings.id = ? AND showings.annotator = ?"
            " WHERE labels.annotator = showings.annotator AND labels.item = showings.item"
            " AND repeat = (policy = 'repeat') AND superseded_at IS NULL",
            showing,
            annotator,
        )
        return bool(rows)

    def record(
        self,
        annotator: str,
        item: str,
        verdict: Verdict,
        comment: str = "",
        *,
        policy: Literal["machine", "import"] = "machine",
        seconds: float = 0.0,
    ) -> bool:
        """Store a label that no page of ours asked for; False, and nothing stored, where the annotator has one of it.

        The item must have been added.
        """
        with self.transaction():
            if self.verdict(annotator, item) is not None:
                return False
            showing = self._database.execute(
                "INSERT INTO showings (annotator, item, swapped, policy, shown_at, is_open) VALUES (?, ?, 0, ?, ?, 0)",
                (annotator, item, policy, self._clock()),
            ).lastrowid
            choice = _CHOICES.get(verdict, verdict)
            self._database.execute(
                "INSERT INTO labels (showing, annotator, item, repeat, choice, comment, seconds, labeled_at)"
                " VALUES (?, ?, ?, 0, ?, ?, ?, ?)",
                (showing, annotator, item, choice, comment, seconds, self._clock()),
            )
            return True

    def verdict(self, annotator: str, item: str) -> Verdict | None:
        """What an annotator's label says of a pair, repeats left out; None without a label that stands."""
        rows = self._rows(
            _LABELS + "AND labels.annotator = ? AND labels.item = ? AND NOT repeat", annotator, item
        )
        return _labels(rows)[0].verdict if rows else None

    def undo(self, annotator: str, label: int) -> bool:
        """Supersede a label of the annotator's and put its pair before them again, in the same order.

        False, and nothing changed, where it does not stand any more: an undo that is sent twice takes back one label.
        """
        with self.transaction():
            cursor = self._database.execute(
                "UPDATE labels SET superseded_at = ? WHERE id = ? AND annotator = ? AND superseded_at IS NULL",
                (self._clock(), label, annotator),
            )
            if cursor.rowcount == 0:
                return False
            shown = self._showings("WHERE id = (SELECT showing FROM labels WHERE id = ?)", label)[0]
            self.show(annotator, shown.item, shown.policy, shown.swapped)
            return True
