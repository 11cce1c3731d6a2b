"""The reward model stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tuner.config import FocalRanking, RewardModel
from tuner.data.comparisons import Comparisons
from tuner.data.conditions import Conditions, read_conditions
from tuner.data.dataset import Dataset, Progress
from tuner.data.examples import Examples
from tuner.data.load_preferences import load_preferences
from tuner.evaluation.report_card.card import CONTROLS, SEEN
from tuner.models.load import Loaded, load_tokenizer
from tuner.models.memory import MemoryPlan
from tuner.models.reward_record import write_reward_record
from tuner.stages.check import CheckReport, check_model
from tuner.stages.context import Context
from tuner.stages.memory_budget import Options
from tuner.stages.model_folder import TrainedModel
from tuner.stages.packed_rows import pass_options, plan, plan_figures
from tuner.stages.reward.evaluate import evaluate
from tuner.stages.reward.figures import FIGURES
from tuner.stages.reward.finish import make_record, write_reward_model
from tuner.stages.reward.loop import reward
from tuner.stages.run import Run
from tuner.stages.stage import Evaluation, Preview, Stage
from tuner.training.figures import StageFigures


def unreachable_margins(loss: FocalRanking, rows: Comparisons) -> list[str]:
    """A sentence on the pairs whose margin scores within the loss's bound can never reach; none where all can."""
    if loss.penalty != "log" or not loss.barrier:  # the score has no bound
        return []
    margins_P = rows.margins * loss.margin
    pairs = np.flatnonzero(margins_P >= 2 * loss.bound)
    if not len(pairs):
        return []
    first_row = int(np.searchsorted(rows.pair_offsets, pairs[0], side="right")) - 1
    return [
        f"{len(pairs):,} pairs have a margin that no scores within ± loss.bound ({loss.bound:g}) can be apart, such as "
        f"{margins_P[pairs[0]]:g} in {rows.origin(first_row)}: lower loss.margin or the rows' margins below "
        f"{2 * loss.bound:g}, or raise loss.bound"
    ]


class RewardStage(Stage[RewardModel]):
    """Answers to the same prompt, packed; ranking loss of their scores."""

    example_rows = {"data": "pair.jsonl"}  # noqa: RUF012 (a constant of the class)
    has_page = True

    def example_rows_for(self, config: RewardModel, field: str) -> str:
        compares = config.data.template == "polar"
        return "pair_reference.jsonl" if compares else self.example_rows[field]

    def figures(self, config: RewardModel) -> StageFigures:
        return FIGURES

    def load_rows(
        self, config: RewardModel, tokenizer: Any, *, progress: Progress | None = None
    ) -> Dataset[Comparisons]:
        conditions = Conditions(read_conditions(config.conditions), config.seed)
        rows = load_preferences(config.data, tokenizer, conditions, config.reward_token, progress=progress)
        rows.report.notes += unreachable_margins(config.loss, rows.train)
        return rows

    def preview(self, config: RewardModel, rows: Dataset[Comparisons], num_passes: int) -> Preview:
        """Every answer with its prompt is an example."""
        groups = [rows.train.answers(group).tolist() for group in plan(config, rows).passes(0)[:num_passes]]
        return Preview(rows.train.sequences, groups, rows.train.describe)

    def examples(self, rows: Dataset[Comparisons]) -> Examples:
        return rows.train.sequences

    def check(self, config: RewardModel, stand_ins: frozenset[str] = frozenset()) -> CheckReport:
        model = check_model(config, freeze=config.freeze, head="score")
        rows = self.load_rows(config, model.loaded.tokenizer)
        figures = plan_figures(config, plan(config, rows))
        return model.report(rows, figures)

    def memory_plans(self, config: RewardModel) -> Callable[[RewardModel], MemoryPlan]:
        return check_model(config, freeze=config.freeze, head="score").memory

    def memory_options(self, config: RewardModel, processes: int) -> Options:
        """The answers of a row share a pass, and only the rows tell how many these are."""
        rows = self.load_rows(config, load_tokenizer(config.model)).train
        longest = max(2 * config.data.max_length, int(rows.lengths.max(initial=0)))
        return pass_options(config, longest, processes)

    def train(self, config: RewardModel, context: Context) -> None:
        reward(config, context)

    def trained_model(self, config: RewardModel) -> TrainedModel:
        return TrainedModel(config.model, config.adapter, config.data.template, config.freeze, "score")

    def write_model(self, config: RewardModel, loaded: Loaded, folder: Path) -> None:
        """Without a report card, of which nothing was measured."""
        write_reward_model(config, loaded, folder)

    def evaluate(self, run: Run, config: RewardModel, against: Sequence[str] = ()) -> Evaluation:
        return evaluate(run, config)

    def write_beside(self, config: RewardModel, folder: Path) -> None:
        write_reward_record(folder, make_record(config, None))

    def result_lines(self, results: Mapping[str, Any]) -> Mapping[str, Mapping[str, float | None]]:
        """Of every control and of all rows."""
        return {
            group: {name: value for name, value in results.get(group, {}).items() if isinstance(value, float)}
            for group in (SEEN, *CONTROLS, "overall")
        }

    def closing_lines(self, run: Run) -> Mapping[str, str]:
        report = run.folder / "report.html"
        lines = {"report": str(report)} if report.is_file() else {}
        return {**lines, "next": f"tuner eval {run.folder}, tuner score {run.folder} ROWS.jsonl"}


STAGE = RewardStage()
