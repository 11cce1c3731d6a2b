"""The DPO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tuner.config import DPO
from tuner.data.comparisons import Comparisons
from tuner.data.dataset import Dataset, Progress
from tuner.data.examples import Examples
from tuner.data.load_pairs import answer_suffix, load_pairs, pair_sequences, pairs
from tuner.data.template import Template
from tuner.models.load import load_tokenizer
from tuner.models.memory import MemoryPlan
from tuner.stages.check import CheckReport
from tuner.stages.context import Context
from tuner.stages.dpo.figures import FIGURES
from tuner.stages.dpo.loop import dpo
from tuner.stages.dpo.plan import plan_pairs
from tuner.stages.padded_rows import PaddedRow, preview_rows
from tuner.stages.stage import Preview, Stage
from tuner.stages.trl_run import check_with_trl, memory_with_trl
from tuner.training.figures import StageFigures


class DPOStage(Stage[DPO]):
    """Pairs of answers, padded; losses and loop by TRL's DPOTrainer."""

    example_rows = {"data": "pair_messages.jsonl"}  # noqa: RUF012 (a constant); TRL has no weights
    memory_fields = ("pairs_per_pass",)

    def figures(self, config: DPO) -> StageFigures:
        return FIGURES

    def load_rows(
        self, config: DPO, tokenizer: Any, *, progress: Progress | None = None
    ) -> Dataset[Comparisons]:
        return load_pairs(config.data, tokenizer, progress=progress)

    def preview(self, config: DPO, rows: Dataset[Comparisons], num_passes: int) -> Preview:
        """The pairs of the first passes, as TRL gets them."""
        tokenizer: Any = load_tokenizer(config.model)
        tail = answer_suffix(Template(config.data.template, tokenizer), tokenizer)
        shown = _padded_rows(rows.train, tail)
        return preview_rows(shown, rows.train.sequences, 2 * config.pairs_per_pass, num_passes)

    def examples(self, rows: Dataset[Comparisons]) -> Examples:
        return rows.train.sequences

    def check(self, config: DPO, stand_ins: frozenset[str] = frozenset()) -> CheckReport:
        return check_with_trl(self, config, _plan_figures)

    def memory_plans(self, config: DPO) -> Callable[[DPO], MemoryPlan]:
        return memory_with_trl(config)

    def train(self, config: DPO, context: Context) -> None:
        dpo(config, context)


STAGE = DPOStage()


def _padded_rows(comparisons: Comparisons, tail: np.ndarray) -> Iterator[PaddedRow]:
    """Both answers of every pair. tail: tokens removed from the end of answers."""
    sequences = zip(*pair_sequences(comparisons), strict=True)
    for pair, (better, worse) in zip(pairs(comparisons, tail), sequences, strict=True):
        for side, sequence in (("chosen", better), ("rejected", worse)):
            answer, learned = pair[f"{side}_ids"], pair[f"{side}_learned"]
            yield PaddedRow(pair["prompt_ids"], answer, learned, side, int(sequence))


def _plan_figures(config: DPO, rows: Dataset[Comparisons]) -> dict[str, Any]:
    """Steps, tokens, passes and fill of a run in one process; tokens are estimated from the mean over all pairs."""
    plan, lengths = plan_pairs(config, len(rows.train.better)), rows.train.sequences.lengths
    tokens = sum(int(lengths[answers].sum()) for answers in pair_sequences(rows.train))
    return {
        "steps": plan.steps,
        "tokens": round(tokens * plan.seen / plan.pairs),
        "passes": plan.passes,
        "fill": plan.seen / (plan.steps * config.pairs_per_step),
    }
