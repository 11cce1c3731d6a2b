"""The raw replies of judges, in the file of the labels: what was paid for is never asked again."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tuner.errors import UserError

_WAIT = 30.0
"""Seconds to wait for another process that writes."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS judge_replies (
    request TEXT PRIMARY KEY,
    annotator TEXT NOT NULL,
    item TEXT NOT NULL,
    reply TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    received_at REAL NOT NULL
)
"""


class Usage(NamedTuple):
    """What an annotator's replies took, over all sessions."""

    replies: int
    prompt_tokens: int
    completion_tokens: int


class ReplyCache:
    """The replies in a file of labels, which must exist. A connection of its own: replies come in another thread."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._database = sqlite3.connect(file, timeout=_WAIT, isolation_level=None, check_same_thread=False)
        # survives a kill, not a power cut: then the last replies are asked for again, and a disk need not wait for each
        self._write("PRAGMA synchronous = NORMAL")
        self._write(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def get(self, request: str) -> str | None:
        """The body of the reply to a request; see `request_key`."""
        row = self._database.execute(
            "SELECT reply FROM judge_replies WHERE request = ?", (request,)
        ).fetchone()
        return None if row is None else row[0]

    def put(self, request: str, annotator: str, item: str, reply: str, tokens: tuple[int, int]) -> None:
        """Store the reply to a request at once. tokens: of the prompt and of the completion.

        Raises UserError when the file cannot be written.
        """
        values = (request, annotator, item, reply, *tokens, time.time())
        self._write("INSERT OR IGNORE INTO judge_replies VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def usage(self, annotator: str) -> Usage:
        """What the annotator's replies took."""
        row = self._database.execute(
            "SELECT count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) FROM judge_replies"
            " WHERE annotator = ?",
            (annotator,),
        ).fetchone()
        return Usage(*row)

    def _write(self, statement: str, values: tuple[object, ...] = ()) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.OperationalError as error:  # a full disk, or another process that writes on and on
            raise UserError(f"{self._file}: no reply can be stored ({error}); try again") from error


def request_key(url: str, body: Mapping[str, Any]) -> str:
    """A hash of a request, by which its reply is stored."""
    text = json.dumps([url, body], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
