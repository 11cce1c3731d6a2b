"""Rows for a quantization: what it is fitted to is not what it is measured on."""

import pytest

from tuner.config import load_config, override
from tuner.config.serialization import to_json
from tuner.errors import UserError
from tuner.stages.calibration import calibration_rows


def run_of(folder, **changes):
    """A run's folder as far as it says what the rows are."""
    config = override(load_config("quickstart_sft"), {"data.files": ["tuner:sums/train.jsonl"]} | changes)
    (folder / "config.json").write_text(to_json(config))
    return str(folder)


def test_without_test_rows_it_is_measured_on_other_rows_of_the_training(tmp_path):
    rows = calibration_rows(
        run_of(tmp_path, **{"data.limit": 40, "data.test_files": [], "evaluation.score": None})
    )
    fitted, measured = {tuple(row) for row in rows.calibration}, {tuple(row) for row, _ in rows.held_out}
    assert len(rows.calibration) == len(rows.held_out) == 20
    assert not fitted & measured
    assert rows.held_out_name == "20 rows of its training that it was not fitted to"
    # the prompt has no weight
    assert all(weights[0] == 0 < max(weights) for _, weights in rows.held_out)


def test_test_rows_come_first(tmp_path):
    rows = calibration_rows(run_of(tmp_path, **{"data.limit": 40}))
    assert rows.held_out_name == "40 test rows"
    assert len(rows.calibration) == 20


def test_a_model_folder_has_no_rows(tmp_path):
    with pytest.raises(UserError, match="name a run folder"):
        calibration_rows(str(tmp_path))
