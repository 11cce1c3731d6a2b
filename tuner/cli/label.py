"""`tuner label`: people choose the better of two answers, on a page that this machine alone can open."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tuner.printable import echo

if TYPE_CHECKING:
    from tuner.config import People
    from tuner.feedback.queue import Queue
    from tuner.feedback.round_folders import LabelFiles
    from tuner.feedback.store import LabelStore


def label(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|RUN",
            help="Candidates: JSONL rows of a prompt and two answers; or a run of several rounds (its newest is "
            "labeled), or one of its rounds.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Annotator; default: your login name.")] = None,
    overlap: Annotated[
        int | None, typer.Option(min=1, help="Annotators for each pair; default: the run's, or 1.")
    ] = None,
    order: Annotated[
        Literal["random", "nearest", "disagreement"] | None,
        typer.Option(
            help="Order of pairs: random, or those first that reward models score most alike or dispute most; default: "
            "the run's, or random."
        ),
    ] = None,
    repeats: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of pairs shown again to the same annotator; default: the run's, or 0.1.",
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="SQLite file of the labels; default: labels.sqlite beside FILE, or in the round's folder."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: a free one.")] = 8017,
    imports: Annotated[
        list[Path] | None,
        typer.Option(
            "--import",
            metavar="FILE",
            help="Store the labels of an export of Argilla or Label Studio, and exit.",
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the labels, of a run's rounds all, as rows of preferences, and exit."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Print agreement and other figures, of a run by round, and exit.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --report: as JSON.")] = False,
) -> None:
    """Label pairs of answers in the browser: two answers in random order, under the guideline of their condition.

    Labels are stored at once; several annotators may label at the same time, each by a command with their --name.
    """
    from tuner.cli import label_report
    from tuner.errors import UserError
    from tuner.feedback.round_folders import is_run, label_files, people_of

    if json and not report:
        raise UserError("--json belongs to --report; add --report")
    label_sets = _with_store(label_files(target), store)
    if imports:
        _import(imports, label_sets[-1])
    if export is not None:
        label_report.export(label_sets, export)
    if report:
        label_report.report(label_sets, is_run(target), json)
    if export is None and not report and not imports:
        people = people_of(target)
        choices = {"overlap": overlap, "order": order, "repeats": repeats}
        chosen = {field: value for field, value in choices.items() if value is not None}
        _label(label_sets[-1], people.model_copy(update=chosen), _annotator(name), port)


def _with_store(label_sets: list[LabelFiles], store: Path | None) -> list[LabelFiles]:
    """The files, with the store that the user names. Raises UserError where there are several."""
    from dataclasses import replace

    from tuner.errors import UserError

    if store is None:
        return label_sets
    if len(label_sets) > 1:
        raise UserError(
            "--store names one file, and this run has several rounds; name a round, as in RUN/round_1"
        )
    return [replace(label_sets[0], store=store)]


def _annotator(name: str | None) -> str:
    """The annotator's name. Raises UserError where it is empty or a program's, or none is known."""
    import getpass

    from tuner.config.feedback_config import is_machine_name
    from tuner.errors import UserError

    try:
        annotator = (getpass.getuser() if name is None else name).strip()
    except (OSError, KeyError) as error:  # a user without a name, as in containers
        raise UserError("your login has no name; write --name") from error
    if not annotator:
        raise UserError("--name is empty; write the annotator's name")
    if is_machine_name(annotator):
        raise UserError(f"--name {annotator}: such names are those of judges and rules; write a person's")
    return annotator


def _open(files: LabelFiles) -> LabelStore:
    from tuner.feedback.store import LabelStore

    if files.round is not None:  # a round's folder has none before its first label
        files.store.parent.mkdir(exist_ok=True)
    return LabelStore(files.store)


def _import(exports: list[Path], files: LabelFiles) -> None:
    """Store the labels of other tools' exports, and say to stderr what became of them."""
    from contextlib import closing

    from tuner.feedback.candidates import read_candidates
    from tuner.feedback.label_import import import_labels

    candidates = read_candidates(files.candidates)
    with closing(_open(files)) as store:
        for file in exports:
            for sentence in import_labels(file, candidates, store).sentences():
                echo(sentence, sys.stderr)


def _label(files: LabelFiles, people: People, annotator: str, port: int) -> None:
    """Serve the page of a file's or a round's candidates."""
    from contextlib import closing

    from tuner.feedback.candidates import read_candidates
    from tuner.feedback.queue import Queue

    candidates = read_candidates(files.candidates)
    with closing(_open(files)) as store:
        store.add(candidates.values())
        if files.round is not None:
            echo(f"round {files.round}: {files.candidates}")
        _serve(Queue(store, candidates, people.overlap, people.order, people.repeats), annotator, port)


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
