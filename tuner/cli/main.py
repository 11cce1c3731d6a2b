"""The command line: one verb a module, each importing what is heavy only when it runs."""

from __future__ import annotations

import os
import sys
from typing import Any

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

app = typer.Typer(
    help="Fine-tuning and alignment of language models: Python files as configs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (train, check, show, configs, copy, data, chat, score, merge, export):
    app.command()(verb)
app.command("eval")(evaluate)


_UsageError = typer.BadParameter.__mro__[1]  # click's, which typer has begun to carry in itself


def main() -> None:
    """Exit code 0 only on success, 2 for the user's mistakes, with one sentence and no traceback."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make tiny models ten times slower
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = sys.argv[1:]
    try:
        code = app(arguments or ["--help"], prog_name="tuner", standalone_mode=False)
    except _UsageError as error:
        print(f"tuner: {_explain(error)}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = "tuner" if rank == "0" else f"tuner: rank {rank}"
        print(f"{where}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "Connection closed by peer" in str(error):  # gloo's, in the ranks that wait for one that failed
            sys.exit(LOST)
        raise
    except KeyboardInterrupt:
        print("tuner: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or (0 if arguments else 2))


def _explain(error: Any) -> str:
    """What is wrong with the command itself, and where it is described."""
    command = error.ctx.command_path if error.ctx else "tuner"
    verb = command.removeprefix("tuner").strip()
    what = " ".join(error.format_message().split()).rstrip(".")
    what = f"{verb}: {what[0].lower()}{what[1:]}" if verb else f"{what[0].lower()}{what[1:]}"
    return f"{what}; `{command} --help` shows what it takes"
