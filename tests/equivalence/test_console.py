"""What `train` says on the console, for every stage: what became of the rows, and nothing of other libraries'."""

from __future__ import annotations

from pathlib import Path

import pytest

import tuner
from tests.equivalence.conftest import SMALL, SMALL_REWARD
from tests.equivalence.test_run_models import SMALL_DPO
from tuner.config import StageConfig, override
from tuner.errors import UserError
from tuner.stages.check import check


@pytest.mark.parametrize("config", [SMALL, SMALL_REWARD, SMALL_DPO], ids=["sft", "reward", "dpo"])
def test_what_became_of_the_rows_is_said(
    config: StageConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    length = {"small": 36, "reward": 66, "dpo": 45}[str(config.name)]  # about the median
    changes = {"data.max_length": length, "data.too_long": "drop", "max_steps": 1, "adapter": None}
    tuner.train(override(config, changes), runs=tmp_path)
    printed = capfd.readouterr().err
    assert "too long and dropped" in printed
    assert "rows read from 1 source" in printed
    for bar in ("Writing model shards", "Loading weights", "it/s"):
        assert bar not in printed


def test_a_run_that_cannot_reach_max_steps_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = override(SMALL, {"data.limit": 20, "max_steps": 50})
    run = tuner.train(config, runs=tmp_path)
    sentence = f"max_steps=50 is not reached: the rows give {len(run.metrics)} steps in 1 epochs"
    assert sentence in capfd.readouterr().err
    assert any(note.startswith(sentence) for note in check(config).notes)


@pytest.mark.parametrize("field", ["keep_best", "patience"])
def test_the_best_of_no_validation_rows_is_refused(field: str) -> None:
    changes = {
        "data.limit": 3,
        "data.split.validation": 0.01,
        f"evaluation.{field}": 1 if field == "patience" else True,
    }
    with pytest.raises(UserError, match=r"need validation rows, and none is left \(3 rows read"):
        check(override(SMALL, changes))
