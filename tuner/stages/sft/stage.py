"""The SFT stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tuner.config import SFT, Text
from tuner.data.dataset import Dataset, Progress
from tuner.data.examples import Examples
from tuner.data.load_examples import load_examples
from tuner.evaluation.held_out_chat import load_score
from tuner.models.memory import MemoryPlan
from tuner.stages.check import CheckReport, check_model
from tuner.stages.context import Context
from tuner.stages.memory_budget import Options
from tuner.stages.model_folder import TrainedModel
from tuner.stages.packed_rows import pass_options, plan, plan_figures
from tuner.stages.run import Run
from tuner.stages.sft.evaluate import evaluate, template_of
from tuner.stages.sft.figures import FIGURES
from tuner.stages.sft.loop import sft
from tuner.stages.stage import Evaluation, Preview, Stage
from tuner.training.figures import StageFigures


class SFTStage(Stage[SFT]):
    """Conversations or raw texts, packed; cross entropy of the tokens the loss is taken on."""

    def figures(self, config: SFT) -> StageFigures:
        return FIGURES

    def load_rows(
        self, config: SFT, tokenizer: Any, *, progress: Progress | None = None
    ) -> Dataset[Examples]:
        return load_examples(config.data, tokenizer, progress=progress)

    def preview(self, config: SFT, rows: Dataset[Examples], num_passes: int) -> Preview:
        return Preview(rows.train, plan(config, rows).passes(0)[:num_passes])

    def check(self, config: SFT, stand_ins: frozenset[str] = frozenset()) -> CheckReport:
        load_score(config.evaluation.score)
        model = check_model(config, freeze=config.freeze)
        rows = self.load_rows(config, model.loaded.tokenizer)
        figures = plan_figures(config, plan(config, rows))
        return model.report(rows, figures)

    def memory_plans(self, config: SFT) -> Callable[[SFT], MemoryPlan]:
        return check_model(config, freeze=config.freeze).memory

    def memory_options(self, config: SFT, processes: int) -> Options:
        return pass_options(config, config.data.max_length, processes)

    def train(self, config: SFT, context: Context) -> None:
        sft(config, context)

    def trained_model(self, config: SFT) -> TrainedModel:
        return TrainedModel(config.model, config.adapter, template_of(config), config.freeze)

    def evaluate(self, run: Run, config: SFT, against: Sequence[str] = ()) -> Evaluation:
        return evaluate(run, config, self.load_rows)

    def example_rows_for(self, config: SFT, field: str) -> str:
        return "text.jsonl" if isinstance(config.data, Text) else "messages.jsonl"


STAGE = SFTStage()
