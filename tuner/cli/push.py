"""`tuner push`: a run's model on a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.printable import echo


def push(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    destination: Annotated[str, typer.Argument(help="hf:owner/name or modelscope:owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Only you can see the repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, and print the card.")
    ] = False,
) -> None:
    """Upload a run's model with its card and curves to the Hugging Face hub or ModelScope."""
    from tuner.stages.publish import CARD, plan_upload, upload

    plan = plan_upload(run, destination)
    if not dry_run:
        echo(upload(plan, private=private))
        return
    for name, file in plan.files.items():
        echo(f"{name}  {file.stat().st_size:,} bytes")
    echo(f"{CARD}\n\n{plan.card}", end="")
