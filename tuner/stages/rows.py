"""The rows of a config, without a model: to be looked at, checked, and compared on."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from tuner.config import SFT, Stage
from tuner.data import view
from tuner.data.load import Dataset, load_data
from tuner.data.stream import Stream, make_stream
from tuner.errors import UserError
from tuner.models.load import load_tokenizer
from tuner.training.run import Run, functions_of


def load_rows(config: Stage) -> tuple[Dataset, object]:
    """(samples, tokenizer) of a config's data."""
    assert isinstance(config, SFT)
    tokenizer = load_tokenizer(config.model)
    return load_data(config.data, tokenizer), tokenizer


def plan(config: Stage, data: Dataset) -> Stream:
    """The steps a config makes of its samples."""
    assert isinstance(config, SFT)
    return make_stream(
        data.train,
        tokens_per_step=config.tokens_per_step,
        tokens_per_pass=config.tokens_per_pass,
        epochs=config.epochs,
        seed=config.seed,
        sources=config.data.sources,
    )


@dataclass(frozen=True)
class DataPage:
    """The tokens a config learns from, as a page of HTML that stands alone; in Jupyter it is shown."""

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        """In a frame of its own: its style must not reach the notebook's."""
        frame = "width:100%;height:720px;border:1px solid rgba(128,128,128,.3);border-radius:8px"
        return f'<iframe sandbox style="{frame}" srcdoc="{escape(self.html)}"></iframe>'


def view_data(config: Stage, passes: int = 1) -> DataPage:
    """Look at the tokens of a config's first passes, at statistics, and at what is wrong with the rows."""
    rows, tokenizer = load_rows(config)
    shown = plan(config, rows).passes(0)[:passes]
    return DataPage(view.html(rows.train, tokenizer, shown, rows.report, title=config.name or "data"))  # type: ignore[arg-type]


def training_texts(run: str, count: int = 64) -> list[str]:
    """The first samples a run was trained on, as text."""
    folder = Path(run)
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{run}: not a run folder, so it has no rows to compare on: add --text FILE")
    config = Run(folder).config
    if functions_of(config):
        raise UserError(
            f"{run}: its config names code, which merging will not run: add --text FILE to compare on"
        )
    data, tokenizer = load_rows(config)
    samples = (data.train.example(index)[0].tolist() for index in range(min(count, len(data.train))))
    return [tokenizer.decode(tokens) for tokens in samples]  # type: ignore[attr-defined]
