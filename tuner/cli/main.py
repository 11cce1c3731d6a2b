"""The command line: one module per verb, which imports heavy libraries only when it runs."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any, cast

import typer

from tuner import __version__
from tuner.cli.card import card
from tuner.cli.chat import chat
from tuner.cli.check import check
from tuner.cli.configs import configs
from tuner.cli.copy import copy
from tuner.cli.data import data
from tuner.cli.eval import evaluate
from tuner.cli.export import export
from tuner.cli.import_config import import_config
from tuner.cli.label import label
from tuner.cli.merge import merge
from tuner.cli.push import push
from tuner.cli.score import score
from tuner.cli.serve import serve
from tuner.cli.serve_rollouts import serve_rollouts
from tuner.cli.show import show
from tuner.cli.train import train
from tuner.errors import LOST, UserError
from tuner.printable import echo

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for verb in (
    train,
    check,
    show,
    configs,
    copy,
    data,
    chat,
    score,
    label,
    merge,
    export,
    serve,
    card,
    push,
    serve_rollouts,
):
    app.command()(verb)
app.command("eval")(evaluate)
app.command("import")(import_config)


def _show_version(value: bool) -> None:
    if value:
        echo(f"tuner {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version, and exit."),
    ] = False,
) -> None:
    """Fine-tuning and alignment of language models: Python files as configs."""


# click's UsageError, or that of the copy of click that newer versions of typer carry in themselves
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])


def main() -> None:
    """Run a command. Exit code 0 only on success; 2 for user errors, 3 for a run that
    diverged, reported in one sentence without a traceback."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make tiny models ten times slower
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a terminal of another encoding cannot show Chinese, but must not fail
            stream.reconfigure(errors="backslashreplace")
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
    except (RuntimeError, MemoryError) as error:
        if "by peer" in str(error):  # from gloo, on ranks that waited for one that failed
            from tuner.training.heartbeat import await_verdict

            await_verdict()
            sys.exit(LOST)
        if (message := _message_of_full_memory(error)) is None:
            raise
        echo(f"tuner {arguments[0]}: {message}", sys.stderr)
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        echo("tuner: interrupted", sys.stderr)
        sys.exit(130)
    sys.exit(code or (0 if arguments else 2))


def _message_of_full_memory(error: RuntimeError | MemoryError) -> str | None:
    """One sentence where memory did not suffice, as a command that trains nothing says it; None for other errors."""
    from tuner.models.device_errors import full_memory, is_memory_full

    if not is_memory_full(error):
        return None
    return (
        f"{full_memory(error)}; stop what else uses it, or take a smaller model, shorter texts or fewer tokens at a "
        "time (see the command's --help)"
    )


def _fields_named(option: str | None) -> list[str]:
    """`path=...` of the config fields whose name is an option that does not exist, as in --lr."""
    if option is None:
        return []
    from tuner.config.registry import config_class, stage_names
    from tuner.config.serialization import field_paths

    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    paths = [path for stage in stage_names() for path in field_paths(config_class(stage))]
    return [f"{path}=..." for path in dict.fromkeys(paths) if f".{path}".endswith(f".{name}")]


def _usage_message(error: Any) -> str:
    """One sentence on a wrong command line, with a pointer to its help."""
    command = error.ctx.command_path if error.ctx else "tuner"
    verb = command.removeprefix("tuner").strip()
    reason = " ".join(error.format_message().split()).rstrip(".")
    reason = f"{reason[0].lower()}{reason[1:]}"
    if fields := _fields_named(getattr(error, "option_name", None)):
        reason += f"; a field of the config is written without dashes: {' or '.join(fields)}"
    return f"{f'{verb}: {reason}' if verb else reason}; see `{command} --help`"
