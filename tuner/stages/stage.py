"""A stage: everything the tool asks of one kind of training, in one object.

Each folder beside this file has one in its `stage.py`, named `STAGE`; `registry.stage_of` finds it by the config.
Nothing outside a stage's folder asks which stage it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from tuner.config import Model, StageConfig
from tuner.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tuner.data.dataset import Dataset, Progress
    from tuner.data.examples import Examples
    from tuner.stages.check import CheckReport
    from tuner.stages.context import Context
    from tuner.stages.run import Run
    from tuner.training.figures import StageFigures

Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True)
class Preview:
    """Packed rows to look at before training."""

    examples: Examples
    groups: Sequence[Sequence[int]]
    """Numbers of the examples in each packed row."""
    label: Callable[[int], str] = lambda number: ""
    """What an example is, in a few words."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a finished run."""

    title: str
    results: Mapping[str, Any]
    """Plain values, as results.json has them."""
    terminal: RenderableType | None = None
    """For a console; None: the results as they are."""
    page: Callable[[], str] | None = None
    """One page of HTML; None for stages without one."""


class Stage(ABC, Generic[Config]):
    """One kind of training. Its methods are called with configs of its own class."""

    rows_field: ClassVar[str] = "data"
    """Config field with the rows that `tuner eval --files` replaces."""
    example_rows: ClassVar[Mapping[str, str]] = {"data": "messages.jsonl"}
    """Config field with rows -> the file of data_templates/rows that stands in for them in `tuner check --tiny`."""
    has_page: ClassVar[bool] = False
    """Whether an evaluation can be written as a page."""
    memory_fields: ClassVar[tuple[str, ...]] = ("tokens_per_pass",)
    """Config fields to lower when memory runs out."""
    compares_policies: ClassVar[bool] = False
    """Whether an evaluation can compare the run's model with others."""

    @abstractmethod
    def figures(self, config: Config) -> StageFigures:
        """The figures of a step's record: how they are written, charted and drawn."""

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
        """The training rows as token sequences, for comparisons over real text."""
        return rows.train

    def data_config(self, config: Config) -> Any:
        """The part of the config that says how rows are read."""
        return getattr(config, self.rows_field)

    # A run

    @abstractmethod
    def check(self, config: Config, stand_ins: frozenset[str] = frozenset()) -> CheckReport:
        """What a run would load and plan, without weights; raises UserError where the run would.

        stand_ins: config fields whose model is a random small one (`--tiny`), so that nothing is known of its
        training.
        """

    @abstractmethod
    def train(self, config: Config, context: Context) -> None:
        """Train to the end, or raise Interrupted when a signal asks to stop."""

    # Afterwards

    def evaluate(self, run: Run, config: Config, against: Sequence[str] = ()) -> Evaluation:
        """Measure a finished run's model on the test rows of `config`, perhaps against other models.

        Raises UserError where there is nothing to measure on.
        """
        raise UserError(f"{run.folder}: a run of {type(config).__name__} has its measures in results.json")

    def closing_lines(self, run: Run) -> Mapping[str, str]:
        """What `tuner train` prints at the end beside the results: label -> text, such as the command to type next."""
        return {"next": f"tuner chat {run.folder}"}

    # `tuner check --tiny`

    def model_fields(self, config: Config) -> Mapping[str, Model]:
        """Config fields that name models."""
        return {"model": config.model}  # type: ignore[attr-defined]

    def example_rows_for(self, config: Config, field: str) -> str:
        """The file of data_templates/rows that stands in for the rows of a field."""
        return self.example_rows[field]

    def tiny_changes(self, config: Config, stand_ins: frozenset[str]) -> Mapping[str, Any]:
        """Further changes that a config needs where small models stand in for the fields named."""
        return {}
