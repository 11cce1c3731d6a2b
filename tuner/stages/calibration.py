"""Rows of a run to fit a quantization to, and rows to measure it on."""

from __future__ import annotations

from typing import Any

import numpy as np

from tuner.data.examples import Examples
from tuner.errors import UserError
from tuner.models.compress import CalibrationRows
from tuner.models.load import load_tokenizer
from tuner.stages.registry import stage_of
from tuner.stages.run import Run
from tuner.stages.run_models import run_folder_of
from tuner.stages.trust import code_named_by, refuse_code

CALIBRATION, HELD_OUT = 256, 256
"""Rows drawn of each at most."""


def calibration_rows(run: str, *, trust: bool = False) -> CalibrationRows:
    """Rows of a run's training, one a sequence, as they were trained on; and test rows, else others of its training.

    trust: the user's word for the code that the run's config names. Raises UserError where the folder is not a run's,
    it has too few rows, or reading them would run code.
    """
    folder = run_folder_of(run)
    if not (folder / "config.json").is_file():
        raise UserError(f"{run}: --quantize fits a model to the rows it was trained on; name a run folder")
    config = Run(folder).config
    stage = stage_of(config)
    if not trust:
        refuse_code(run, code_named_by(config, stage.data_config(config)))
    rows = stage.load_rows(config, load_tokenizer(stage.tokenizer_model(config)))
    train = stage.examples(rows)
    order = np.random.default_rng(0).permutation(len(train))
    count = min(CALIBRATION, max(1, len(train) // 2))
    calibration, rest = order[:count], order[count:]
    held_out, name = train, "rows of its training that it was not fitted to"
    for part, part_name in ((rows.test, "test rows"), (rows.validation, "validation rows")):
        if isinstance(part, Examples):
            held_out, rest, name = part, np.random.default_rng(0).permutation(len(part)), part_name
            break
    rest = rest[:HELD_OUT]
    if not len(rest):
        raise UserError(
            f"{run}: {len(train)} rows are too few to quantize with; add rows, or leave --quantize out"
        )
    return CalibrationRows(
        [train.example(index)[0].tolist() for index in calibration],
        [_row(held_out, index) for index in rest],
        f"{len(rest)} {name}",
    )


def _row(examples: Examples, index: Any) -> tuple[list[int], list[float]]:
    tokens, weights = examples.example(index)
    return tokens.tolist(), weights.tolist()
