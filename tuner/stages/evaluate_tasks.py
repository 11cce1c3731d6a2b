"""Tasks put to a run's model and to all it was trained from: `tuner eval RUN --tasks ...`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tuner.data.row_files import TEXT_SUFFIXES, format_suffix
from tuner.display.progress import progress_bar
from tuner.display.task_page import task_html, task_terminal
from tuner.errors import UserError
from tuner.evaluation.contamination import Contamination, contamination
from tuner.evaluation.harness import HarnessTasks
from tuner.evaluation.interpreter import Interpreter, has_network
from tuner.evaluation.interpreter_turns import InterpreterAnswers
from tuner.evaluation.local_task import LocalTask, greedy_answers
from tuner.evaluation.task_model import TaskModel, open_task_model
from tuner.evaluation.task_report import Column, TaskReport
from tuner.evaluation.task_rows import read_task
from tuner.evaluation.task_scores import TaskScores
from tuner.models.load import load_tokenizer
from tuner.models.locate import locate
from tuner.models.tokenizer import read_tokenizer
from tuner.stages.finished_model import free_memory
from tuner.stages.lineage import Generation, lineage
from tuner.stages.registry import stage_of
from tuner.stages.run_models import with_usable_models
from tuner.stages.stage import Evaluation
from tuner.stages.trust import code_named_by

MAX_NEW_TOKENS = 512
"""Of an answer to a row of a file, unless said otherwise."""


class Task(Protocol):
    """Rows that are put to models."""

    def measure(self, model: TaskModel) -> list[TaskScores]:
        """The model's figures; of every model the same tasks and metrics."""
        ...


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are put to models."""

    limit: int | None = None
    """Rows of each task; None: all."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Of a generated answer to a row of a file; lm-evaluation-harness's tasks say so themselves."""
    shots: int | None = None
    """Solved examples before each question; None: as lm-evaluation-harness's task says."""
    plain: bool = False
    """Prompts are plain text: no chat template."""
    harness_rules: bool = False
    """Context and continuation are split by lm-evaluation-harness's rule, to compare with its figures."""
    interpreter: bool = False
    """Python blocks that models write are executed."""
    alone: bool = False
    """The model is measured without those that it was trained from."""


def evaluate_tasks(
    path: str,
    tasks: Sequence[str],
    against: Sequence[str] = (),
    options: TaskOptions | None = None,
    *,
    trust: bool = False,
) -> Evaluation:
    """Put tasks to a model and to all it was trained from, and to other models; one is in memory at a time.

    tasks: files of rows (`evaluation/task_rows.py`), and names that lm-evaluation-harness knows. against: runs, model
    folders or hub names. Raises UserError where a model or a task is missing, before any is measured.
    """
    options = options or TaskOptions()
    origins = lineage(path, trust=trust)
    line = origins[-1:] if options.alone else origins
    # one that is in the line is in the table already
    names = {member.name for member in line}
    others = [lineage(other, trust=trust)[-1] for other in dict.fromkeys(against) if other not in names]
    found = _find_tasks(tasks, options)
    chat_template = _chat_template(line[-1])
    columns: list[Column] = []
    cut: list[str] = []
    for place, member in enumerate([*line, *others]):
        scores, lost = _measure(member, found, chat_template, options)
        before = place - 1 if place < len(line) else len(line) - 1
        columns.append(Column(member.name, scores, None if before < 0 else before))
        cut += lost
    seen, notes = _contaminations(columns[0].scores, origins, trust)
    scored_notes = dict.fromkeys(note for scores in columns[0].scores for note in scores.notes)
    if options.interpreter:
        reach = "; they can reach the network, for this system has no namespaces for users" * has_network()
        notes.append(f"Python blocks of the answers were run{reach}")
    report = TaskReport(columns, seen, [*notes, *scored_notes, *cut])
    title = f"{Path(path).name} on {', '.join(Path(name).name for name in tasks)}"
    return Evaluation(title, report.results(), task_terminal(report), lambda: task_html(report, title))


def _find_tasks(names: Sequence[str], options: TaskOptions) -> list[Task]:
    """The tasks in the order of their names; those of lm-evaluation-harness together, behind the others."""
    files = [name for name in names if format_suffix(Path(name)) in TEXT_SUFFIXES]
    harness = [name for name in names if name not in files]
    if options.interpreter and harness:
        raise UserError(
            f"--interpreter: lm-evaluation-harness ({harness[0]}) prompts models itself; name the file of a task's rows"
        )
    answer = InterpreterAnswers(Interpreter()) if options.interpreter else greedy_answers
    tasks: list[Task] = [
        LocalTask(name, read_task(name, options.limit), options.max_new_tokens, answer) for name in files
    ]
    if harness:
        tasks.append(HarnessTasks(harness, options.limit, options.shots, options.harness_rules).checked())
    return tasks


def _chat_template(member: Generation) -> str | None:
    """The text of a model's chat template, for those of the models before it that have none."""
    folder = locate(member.model, weights=False).tokenizer_folder
    tokenizer: Any = read_tokenizer(folder, trust_remote_code=member.model.trust_remote_code)
    return getattr(tokenizer, "chat_template", None)


def _measure(
    member: Generation, tasks: Sequence[Task], chat_template: str | None, options: TaskOptions
) -> tuple[list[TaskScores], list[str]]:
    """A model's figures, and sentences on what was cut; its memory is free when this returns."""
    with progress_bar(member.name, len(tasks)) as advance:
        model = open_task_model(
            member.model, member.precision, chat_template=chat_template, plain=options.plain
        )
        scores: list[TaskScores] = []
        for task in tasks:
            scores += task.measure(model)
            advance(1)
        lost = [f"{member.name}: {sentence}" for sentence in _cut(model)]
    del model
    free_memory()
    return scores, lost


def _cut(model: TaskModel) -> Iterator[str]:
    """Sentences on the prompts and answers that were cut."""
    if model.cut:
        yield f"{len(model.cut):,} prompts lost their beginning: longer than it was trained for"
    for asked, most in model.curbed.items():
        yield f"answers had at most {most:,} tokens, not {asked:,}: half of the {model.max_length:,} it was trained for"


def _contaminations(
    scores: Sequence[TaskScores], line: Sequence[Generation], trust: bool
) -> tuple[dict[str, Contamination], list[str]]:
    """Each task's rows that stand in the rows of the runs of a line; sentences on what was compared."""
    texts_of = {figure.task: figure.texts for figure in scores if figure.texts}
    # the rounds of a run have one config
    runs = list({id(member.config): member for member in line if member.config is not None}.values())
    if not texts_of or not runs:
        return {}, []
    try:
        texts = [text for member in runs for text in _training_texts(member, trust)]
    except UserError as error:
        return {}, [f"Not compared with the rows of training: {error}"]
    found = {task: contamination(rows, texts) for task, rows in texts_of.items()}
    compared = next(iter(found.values())).training_rows
    return found, [
        f"{task}: {int(seen.seen_A.sum()):,} of {len(seen.seen_A):,} rows stand in the {compared:,} rows of training "
        f"(sequences of {seen.words} words; a pretrained base's own rows are not known)"
        for task, seen in found.items()
    ]


def _training_texts(member: Generation, trust: bool) -> Iterator[str]:
    """The rows that a run was trained on, as text. UserError where they are gone, or reading them would run code."""
    config = with_usable_models(member.config)  # type: ignore[arg-type]
    stage = stage_of(config)
    names = code_named_by(config, stage.data_config(config))
    if names and not trust:
        raise UserError(f"{member.name} names code to read them with ({', '.join(names)}); add --trust")
    tokenizer = load_tokenizer(stage.tokenizer_model(config))
    examples = stage.examples(stage.load_rows(config, tokenizer))
    for index in range(len(examples)):
        yield str(tokenizer.decode(examples.example(index)[0].tolist()))
