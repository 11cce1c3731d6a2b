"""Options of `tuner eval --tasks`."""

from pathlib import Path
from typing import Annotated

import typer

Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks to measure the model on, before and after its training, separated by commas: a JSONL file of "
        "your rows, or names of lm-evaluation-harness (gsm8k, ifeval, mmlu). needle, multikey and trace ask for "
        "facts in long prompts."
    ),
]
Lengths = Annotated[
    str | None,
    typer.Option(
        help="needle, multikey, trace: lengths of prompts in tokens, separated by commas; default: up to the model's."
    ),
]
OpenCompass = Annotated[
    Path | None,
    typer.Option(
        help="--tasks: write a config for OpenCompass with these of its datasets, and measure nothing."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="--tasks: rows of each task.")]
Shots = Annotated[int | None, typer.Option(min=0, help="--tasks: solved examples before each question.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="--tasks: maximum length of an answer to a row of a file, in tokens; default: 512."
    ),
]
Alone = Annotated[
    bool, typer.Option("--alone", help="--tasks: leave out the models that the run was trained from.")
]
Plain = Annotated[bool, typer.Option("--plain", help="--tasks: prompts without a chat template.")]
Interpreter = Annotated[
    bool,
    typer.Option(
        "--interpreter",
        help="--tasks: run the Python blocks that models write in answers to rows of a file, with limits on "
        "time, memory and files.",
    ),
]
HarnessRules = Annotated[
    bool,
    typer.Option(
        "--harness-rules",
        help="--tasks: split context and continuation as lm-evaluation-harness does, to compare with its figures.",
    ),
]
