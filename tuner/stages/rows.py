"""The rows of a config, without a model: to be looked at, checked, and compared on."""

from __future__ import annotations

from pathlib import Path

from tuner.config import SFT, Stage
from tuner.data.load import Dataset, load_data
from tuner.data.stream import Stream, make_stream
from tuner.errors import UserError
from tuner.models.load import load_tokenizer
from tuner.training.run import Run


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


def training_texts(run: str, count: int = 64) -> list[str]:
    """The first samples a run was trained on, as text."""
    folder = Path(run)
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{run}: not a run folder, so it has no rows to compare on: add --text FILE")
    data, tokenizer = load_rows(Run(folder).config)
    samples = (data.train.example(index)[0].tolist() for index in range(min(count, len(data.train))))
    return [tokenizer.decode(tokens) for tokens in samples]  # type: ignore[attr-defined]
