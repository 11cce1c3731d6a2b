"""The KTO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tuner.config import KTO
from tuner.data.dataset import Dataset, Progress
from tuner.data.examples import Examples
from tuner.data.labels import Labels
from tuner.data.load_labels import labeled_answers, load_labels
from tuner.data.load_pairs import answer_suffix
from tuner.data.template import Template
from tuner.models.load import load_tokenizer
from tuner.models.memory import MemoryPlan
from tuner.stages.check import CheckReport
from tuner.stages.context import Context
from tuner.stages.kto.figures import FIGURES
from tuner.stages.kto.loop import kto
from tuner.stages.kto.plan import in_order, plan_answers
from tuner.stages.padded_rows import PaddedRow, preview_rows
from tuner.stages.stage import Preview, Stage
from tuner.stages.trl_run import check_with_trl, memory_with_trl
from tuner.training.figures import StageFigures


class KTOStage(Stage[KTO]):
    """Labeled answers, padded; losses and loop by TRL's KTOTrainer."""

    example_rows = {"data": "labeled.jsonl"}  # noqa: RUF012 (a constant)
    memory_fields = ("answers_per_pass",)

    def figures(self, config: KTO) -> StageFigures:
        return FIGURES

    def load_rows(self, config: KTO, tokenizer: Any, *, progress: Progress | None = None) -> Dataset[Labels]:
        return load_labels(config.data, tokenizer, progress=progress)

    def preview(self, config: KTO, rows: Dataset[Labels], num_passes: int) -> Preview:
        """The answers of the first passes, as TRL gets them."""
        tokenizer: Any = load_tokenizer(config.model)
        tail = answer_suffix(Template(config.data.template, tokenizer), tokenizer)
        labels = in_order(config, rows.train)
        return preview_rows(_padded_rows(labels, tail), labels.sequences, config.answers_per_pass, num_passes)

    def examples(self, rows: Dataset[Labels]) -> Examples:
        return rows.train.sequences

    def check(self, config: KTO, stand_ins: frozenset[str] = frozenset()) -> CheckReport:
        return check_with_trl(self, config, _plan_figures)

    def memory_plans(self, config: KTO) -> Callable[[KTO], MemoryPlan]:
        return memory_with_trl(config)

    def train(self, config: KTO, context: Context) -> None:
        kto(config, context)


STAGE = KTOStage()


def _padded_rows(labels: Labels, tail: np.ndarray) -> Iterator[PaddedRow]:
    for index, row in enumerate(labeled_answers(labels, tail)):
        label = "desirable" if row["label"] else "undesirable"
        yield PaddedRow(row["prompt_ids"], row["completion_ids"], row["completion_learned"], label, index)


def _plan_figures(config: KTO, rows: Dataset[Labels]) -> dict[str, Any]:
    """Steps, tokens, passes and fill of a run in one process; tokens are estimated from the mean over all answers."""
    plan, lengths = plan_answers(config, len(rows.train)), rows.train.sequences.lengths
    return {
        "steps": plan.steps,
        "tokens": round(int(lengths.sum()) * plan.seen / plan.pairs),
        "passes": plan.passes,
        "fill": plan.seen / (plan.steps * config.answers_per_step),
    }
