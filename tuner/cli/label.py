"""`tuner label`: people choose the better of two answers, on a page that this machine alone can open."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tuner.printable import echo, printable_json

if TYPE_CHECKING:
    from tuner.feedback.candidates import Candidate
    from tuner.feedback.queue import Queue
    from tuner.feedback.store import LabelStore


def label(
    file: Annotated[Path, typer.Argument(help="Candidates: JSONL rows of a prompt and two answers.")],
    name: Annotated[str | None, typer.Option(help="Annotator; default: your login name.")] = None,
    overlap: Annotated[int, typer.Option(min=1, help="Annotators for each pair.")] = 1,
    order: Annotated[
        Literal["random", "nearest", "disagreement"],
        typer.Option(
            help="Order of pairs: random, or those first that reward models score most alike or dispute most."
        ),
    ] = "random",
    repeats: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of pairs shown again to the same annotator.")
    ] = 0.1,
    store: Annotated[
        Path | None, typer.Option(help="SQLite file of the labels; default: labels.sqlite beside FILE.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: a free one.")] = 8017,
    export: Annotated[
        Path | None, typer.Option(help="Write the labels as rows of preferences, and exit.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Print agreement and other figures, and exit.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --report: as JSON.")] = False,
) -> None:
    """Label pairs of answers in the browser: two answers in random order, under the guideline of their condition.

    Labels are stored at once; several annotators may label at the same time, each by a command with their --name.
    """
    from tuner.errors import UserError
    from tuner.feedback.candidates import read_candidates
    from tuner.feedback.queue import Queue
    from tuner.feedback.store import LabelStore

    if json and not report:
        raise UserError("--json belongs to --report; add --report")
    candidates = read_candidates(file)
    labels = LabelStore(store or file.with_name("labels.sqlite"))
    try:
        labels.add(candidates.values())
        if export is not None:
            _export(labels, candidates, file, export)
        if report:
            _report(labels, candidates, json)
        if export is None and not report:
            queue = Queue(labels, candidates, overlap, order, repeats)
            _serve(queue, _annotator(name), port)
    finally:
        labels.close()


def _annotator(name: str | None) -> str:
    """The annotator's name. Raises UserError where it is empty, or none is known."""
    import getpass

    from tuner.errors import UserError

    try:
        annotator = (getpass.getuser() if name is None else name).strip()
    except (OSError, KeyError) as error:  # a user without a name, as in containers
        raise UserError("your login has no name; write --name") from error
    if not annotator:
        raise UserError("--name is empty; write the annotator's name")
    return annotator


def _serve(queue: Queue, annotator: str, port: int) -> None:
    """Serve the annotator's page until the command is interrupted."""
    import contextlib
    import secrets
    import socket

    import uvicorn

    from tuner.errors import UserError
    from tuner.feedback.page import LabelPage

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()  # before the address is printed: who opens it at once waits and is not refused
        except OSError as error:
            raise UserError(
                f"--port {port}: cannot be used ({error.strerror}); name another, or 0"
            ) from error
        port = listener.getsockname()[1]
        page = LabelPage(queue, annotator, secrets.token_urlsafe(24), port)
        echo(f"{len(queue.candidates):,} pairs; open http://127.0.0.1:{port}{page.address}")
        echo(f"labels of {annotator} are stored in {queue.store.file}; Ctrl-C ends")
        # lifespan: the application has nothing to start
        server = uvicorn.Server(uvicorn.Config(page.app, log_level="warning", lifespan="off"))
        with contextlib.suppress(KeyboardInterrupt):  # the way this command ends
            server.run(sockets=[listener])
    count = sum(label.annotator == annotator for label in queue.store.labels())
    echo(f"{count:,} labels of {annotator} in {queue.store.file}")


def _export(labels: LabelStore, candidates: dict[str, Candidate], file: Path, output: Path) -> None:
    """Write the rows of preferences, and say to stderr what was left out."""
    import json

    from tuner.cli.output import write_file
    from tuner.errors import UserError
    from tuner.feedback.preferences import preference_rows

    if output.exists() and any(path.exists() and output.samefile(path) for path in (file, labels.file)):
        raise UserError(f"--export {output}: this file is read here; name another one")
    rows, left_out = preference_rows(labels.labels(), candidates)
    write_file(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    echo(f"{len(rows):,} preferences: {output}" + (f"; left out: {reasons}" if reasons else ""), sys.stderr)


def _report(labels: LabelStore, candidates: dict[str, Candidate], json: bool) -> None:
    from tuner.feedback.agreement import report
    from tuner.feedback.preferences import preference_rows

    rows, left_out = preference_rows(labels.labels(), candidates)
    figures = report(labels.labels(), candidates)
    figures = {"candidates": len(candidates), "preferences": len(rows), "left_out": dict(left_out), **figures}
    if json:
        echo(printable_json(figures))
    else:
        _print_report(figures)


_COLUMNS = {
    "labels": "labels",
    "left": "left",
    "self_agreement": "self",
    "gold_accuracy": "planted",
    "ties": "ties",
    "unsure": "unsure",
    "skips": "skips",
    "median_seconds": "seconds",
}
"""Figures that the table shows, and their headings."""


def _print_report(figures: dict[str, Any]) -> None:
    """The figures as a table and lines for the terminal."""
    from tuner.display.table import print_table

    rows = [
        [group["condition"] or "all", group["annotator"] or "all", *(_cell(group[key]) for key in _COLUMNS)]
        for group in figures["groups"]
    ]
    print_table(["condition", "annotator", *_COLUMNS.values()], rows)
    for group in figures["groups"]:
        if group["alpha"] is not None:
            low, high = (_cell(group[key]) for key in ("alpha_low", "alpha_high"))
            pairs = f"{group['overlapping']:,} pairs"
            echo(f"alpha{_of(group)}: {group['alpha']:.2f} (95% interval {low} to {high}, {pairs})")
    for pair in figures["pairs"]:
        if pair["kappa"] is not None:
            both = " and ".join(pair["annotators"])
            echo(f"kappa of {both}{_of(pair)}: {pair['kappa']:.2f} ({pair['items']:,} pairs)")
    counts = {"preferences": figures["preferences"], **figures["left_out"]}
    parts = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    echo(f"{figures['candidates']:,} candidates: {parts}")


def _of(values: dict[str, Any]) -> str:
    return "" if values["condition"] is None else f" under {values['condition']}"


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
