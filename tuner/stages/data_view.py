"""A look at the rows of a config before training: `tuner data`, and `tuner.view_data` in Jupyter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tuner.config import StageConfig
from tuner.data.dataset import Dataset
from tuner.display.data_page import data_html
from tuner.errors import UserError
from tuner.models.load import load_tokenizer, read_model_config
from tuner.models.positions import Positions
from tuner.models.rope import reach
from tuner.printable import safe
from tuner.stages.registry import stage_of
from tuner.stages.row_lengths import long_rows
from tuner.stages.run import Run
from tuner.stages.run_models import run_folder_of, with_usable_models
from tuner.stages.stage import Preview
from tuner.stages.trust import code_named_by, refuse_code


@dataclass(frozen=True)
class DataView:
    """A config's rows, tokenized, and the first packed rows of its first step."""

    config: StageConfig
    tokenizer: Any
    rows: Dataset[Any]
    preview: Preview

    @property
    def tokens_per_pass(self) -> int:
        """The room of a packed row."""
        return self.config.tokens_per_pass  # type: ignore[attr-defined]  # of every stage that packs rows

    def html(self) -> str:
        """One self-contained page."""
        title, preview = self.config.name or "data", self.preview
        return data_html(
            preview.examples,
            self.tokenizer,
            preview.groups,
            self.rows.report,
            title=title,
            label=preview.label,
            tokens_per_pass=self.tokens_per_pass,
        )


def load_data_view(config: StageConfig, passes: int = 1) -> DataView:
    """Load a config's rows. Raises UserError for bad rows, and where the stage does not pack rows."""
    config = with_usable_models(config)
    stage = stage_of(config)
    tokenizer = load_tokenizer(stage.tokenizer_model(config))
    rows = stage.load_rows(config, tokenizer)
    trained = reach(read_model_config(stage.tokenizer_model(config)))
    rows.report.notes += long_rows(rows, Positions(None, trained), stage.tokens_after(config))
    return DataView(config, tokenizer, rows, stage.preview(config, rows, passes))


@dataclass(frozen=True)
class DataPage:
    """The tokens a config is trained on, as a self-contained HTML page, which Jupyter displays."""

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        """In an iframe: the page's style must not apply to the notebook."""
        frame = "width:100%;height:720px;border:1px solid rgba(128,128,128,.3);border-radius:8px"
        return f'<iframe sandbox style="{frame}" srcdoc="{safe(self.html)}"></iframe>'


def view_data(config: StageConfig, passes: int = 1) -> DataPage:
    """Show the tokens of a config's first passes, statistics of its rows, and problems found in them."""
    return DataPage(load_data_view(config, passes).html())


def load_rows(config: StageConfig, tokenizer: Any = None) -> Dataset[Any]:
    """The tokenized rows of a config. tokenizer: its model's, if it is already loaded."""
    stage = stage_of(config)
    tokenizer = load_tokenizer(stage.tokenizer_model(config)) if tokenizer is None else tokenizer
    return stage.load_rows(config, tokenizer)


def training_texts(run: str, count: int = 64, *, trust: bool = False) -> list[str]:
    """The first rows a run was trained on, as text. trust: the user's word for the code that its config names.

    Raises UserError where the folder is not a run's, and without `trust` where reading its rows would run code.
    """
    folder = run_folder_of(run)
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{run}: not a run folder, so it has no rows to compare on: add --text FILE")
    config = Run(folder).config
    stage = stage_of(config)
    if not trust:
        names = code_named_by(config, stage.data_config(config))
        refuse_code(run, names, ", or --text FILE to compare on")
    tokenizer = load_tokenizer(stage.tokenizer_model(config))
    examples = stage.examples(stage.load_rows(config, tokenizer))
    rows = (examples.example(index)[0].tolist() for index in range(min(count, len(examples))))
    return [tokenizer.decode(tokens) for tokens in rows]  # type: ignore[misc]
