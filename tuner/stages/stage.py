"""The interface of a stage: everything that the rest of the tool needs of one kind of training.

Each folder beside this file has one in its `stage.py`, named `STAGE`; `registry.stage_of` finds it by the config.
No code outside a stage's folder depends on which stage it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from tuner.config import Model, StageConfig, TrainingConfig
from tuner.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType
    from torch import Tensor

    from tuner.data.dataset import Dataset, Progress
    from tuner.data.examples import Examples
    from tuner.models.load import Loaded
    from tuner.models.memory import MemoryPlan
    from tuner.stages.check import CheckReport
    from tuner.stages.context import Context
    from tuner.stages.memory_budget import Options
    from tuner.stages.model_folder import TrainedModel
    from tuner.stages.run import Run
    from tuner.training.figures import StageFigures

Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True)
class Preview:
    """Packed rows to show before training."""

    examples: Examples
    groups: Sequence[Sequence[int]]
    """Indices of the examples in each packed row."""
    label: Callable[[int], str] = lambda index: ""
    """Index of an example -> a short description of it."""


@dataclass(frozen=True)
class Evaluation:
    """Measurements of a finished run."""

    title: str
    results: Mapping[str, Any]
    """Plain values, as results.json has them."""
    terminal: RenderableType | None = None
    """How a console shows the results; None: as they are."""
    page: Callable[[], str] | None = None
    """Makes an HTML page; None for stages without one."""


class Stage(ABC, Generic[Config]):
    """One kind of training. Its methods take configs of its own class only."""

    rows_field: ClassVar[str] = "data"
    """Config field with the rows that `tuner eval --files` replaces."""
    example_rows: ClassVar[Mapping[str, str]] = {"data": "messages.jsonl"}
    """Config field with rows -> file of data_templates/rows to use instead in `tuner check --tiny`."""
    has_page: ClassVar[bool] = False
    """Whether an evaluation can be written as a page."""
    memory_fields: ClassVar[tuple[str, ...]] = ("tokens_per_pass",)
    """Config fields to lower when memory runs out."""
    compares_policies: ClassVar[bool] = False
    """Whether an evaluation can compare the run's model with others."""
    trains_runs: ClassVar[bool] = False
    """Whether it trains runs within its own, which find the models they name themselves."""

    @abstractmethod
    def figures(self, config: Config) -> StageFigures:
        """How the figures of a step's record are printed, charted and drawn."""

    # Rows

    def tokenizer_model(self, config: Config) -> Model:
        """The model whose tokenizer encodes the rows."""
        return config.model  # type: ignore[attr-defined]

    @abstractmethod
    def load_rows(self, config: Config, tokenizer: Any, *, progress: Progress | None = None) -> Dataset[Any]:
        """The tokenized rows of a config. Raises UserError with `file:line` for a bad row."""

    @abstractmethod
    def preview(self, config: Config, rows: Dataset[Any], num_passes: int) -> Preview:
        """The first packed rows of the first step. Raises UserError where the stage packs none."""

    def examples(self, rows: Dataset[Any]) -> Examples:
        """The training rows as token sequences."""
        return rows.train

    def tokens_after(self, config: Config) -> int:
        """Tokens that are generated after each row at most."""
        return 0

    def data_config(self, config: Config) -> Any:
        """The part of the config that says how rows are read."""
        return getattr(config, self.rows_field)

    # A run

    def training_config(self, config: Config) -> TrainingConfig:
        """The config, or the part of it, that says on which devices and in what precision the run computes."""
        return config  # type: ignore[return-value]

    @abstractmethod
    def check(self, config: Config, stand_ins: frozenset[str] = frozenset()) -> CheckReport:
        """A dry run without weights. Raises UserError where the run would.

        stand_ins: config fields whose model is a small random one (`--tiny`), which no run has trained: it has no
        adapter, template or conditions.
        """

    def memory_plans(self, config: Config) -> Callable[[Config], MemoryPlan]:
        """Plans the memory of a run, also with other settings: its models are built once, without weights.

        Only of stages that train by themselves.
        """
        raise NotImplementedError(type(config).__name__)

    def memory_options(self, config: Config, processes: int) -> Options:
        """What `memory` chooses for a run of so many processes: nothing that is part of its result."""
        from tuner.stages.memory_budget import Options

        return Options(recomputation=(False, True))  # TRL's trainers know no others

    @abstractmethod
    def train(self, config: Config, context: Context) -> None:
        """Train to the end. Raises Interrupted, after saving, where a signal asks to stop."""

    # Its model

    def trained_model(self, config: Config) -> TrainedModel:
        """The model that a run of this config trains and saves, as it is before the first step."""
        from tuner.stages.model_folder import TrainedModel  # which imports torch

        values: Any = config
        freeze = getattr(config, "freeze", None)
        return TrainedModel(values.model, values.adapter, values.data.template, freeze)

    def weights_of_model(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of the weights in a checkpoint, those of the model that is saved, by their names in it."""
        return weights

    def newest_part(self, run: Path, config: Config) -> Path | None:
        """Of a run that trains runs within its own, the folder of the newest that is a model; None before the first."""
        return None

    def round_models(self, run: Path, config: Config) -> Mapping[str, Path]:
        """Of a run in rounds, name -> folder of each round's policy so far, in order; empty for others."""
        return {}

    def unfinished_part(self, run: Path, config: Config) -> Path | None:
        """Of a run that trains runs within its own, the folder of the one that has begun and not ended, if any."""
        return None

    def write_model(self, config: Config, loaded: Loaded, folder: Path) -> None:
        """Write a model with the weights of a checkpoint; a run writes its own at its end, with what it measured."""
        from tuner.stages.model_folder import write_model_folder

        write_model_folder(loaded, self.trained_model(config).template, folder)

    def write_beside(self, config: Config, folder: Path) -> None:
        """Write what stands beside the weights of a model before anything is measured, but for its tokenizer."""

    # Afterwards

    def evaluate(self, run: Run, config: Config, against: Sequence[str] = ()) -> Evaluation:
        """Measure a finished run's model on the test rows of `config`, and against other models if any are named.

        Raises UserError where there is nothing to measure on.
        """
        raise UserError(f"{run.folder}: a run of {type(config).__name__} has its measures in results.json")

    def result_lines(self, results: Mapping[str, Any]) -> Mapping[str, Mapping[str, float | None]]:
        """Lines of measures that `tuner train` prints at the end: label -> measures by name, None for unmeasured ones.

        results: those of results.json.
        """
        return {when: results.get(when) or {} for when in ("before", "after")}

    def closing_lines(self, run: Run) -> Mapping[str, str]:
        """Lines that `tuner train` prints after the result lines: label -> text, such as the next command to type."""
        return {"next": f"tuner chat {run.folder}"}

    # `tuner check --tiny`

    def model_fields(self, config: Config) -> Mapping[str, Model]:
        """Config fields that name models."""
        return {"model": config.model}  # type: ignore[attr-defined]

    def example_rows_for(self, config: Config, field: str) -> str:
        """The file of data_templates/rows to use for a field; see `example_rows`."""
        return self.example_rows[field]

    def tiny_changes(self, config: Config, stand_ins: frozenset[str]) -> Mapping[str, Any]:
        """Further changes that a config needs where the models of these fields are small random ones."""
        return {}
