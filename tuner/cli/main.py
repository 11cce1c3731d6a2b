"""The command line: one module per verb, which imports heavy libraries only when it runs."""

from __future__ import annotations

import os
import sys
from typing import Any, cast

import typer

from tuner.cli.chat import chat
from tuner.cli.check import check
from tuner.cli.configs import configs
from tuner.cli.copy import copy
from tuner.cli.data import data
from tuner.cli.eval import evaluate
from tuner.cli.export import export
from tuner.cli.merge import merge
from tuner.cli.score import score
from tuner.cli.show import show
from tuner.cli.train import train
from tuner.errors import LOST, UserError
from tuner.printable import echo

app = typer.Typer(
    help="Fine-tuning and alignment of language models: Python files as configs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (train, check, show, configs, copy, data, chat, score, merge, export):
    app.command()(verb)
app.command("eval")(evaluate)


# click's UsageError, or that of the copy of click that newer versions of typer carry in themselves
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])


def main() -> None:
    """Run a command. Exit code 0 only on success; 2 for user errors, 3 for a run that
    diverged, reported in one sentence without a traceback."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make tiny models ten times slower
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = sys.argv[1:]
    try:
        # standalone_mode=False: typer would print its own messages and choose the exit codes.
        code = app(arguments or ["--help"], prog_name="tuner", standalone_mode=False)
    except _UsageError as error:
        echo(f"tuner: {_usage_message(error)}", sys.stderr)
        sys.exit(2)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        prefix = "tuner" if rank == "0" else f"tuner: rank {rank}"
        echo(f"{prefix}: {' '.join(str(error).split())}", sys.stderr)
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if "Connection closed by peer" in str(error):  # from gloo, on ranks that waited for one that failed
            sys.exit(LOST)
        raise
    except KeyboardInterrupt:
        echo("tuner: interrupted", sys.stderr)
        sys.exit(130)
    sys.exit(code or (0 if arguments else 2))


def _usage_message(error: Any) -> str:
    """One sentence on a wrong command line, with a pointer to its help."""
    command = error.ctx.command_path if error.ctx else "tuner"
    verb = command.removeprefix("tuner").strip()
    reason = " ".join(error.format_message().split()).rstrip(".")
    reason = f"{reason[0].lower()}{reason[1:]}"
    return f"{f'{verb}: {reason}' if verb else reason}; see `{command} --help`"
