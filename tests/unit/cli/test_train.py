"""What `tuner train` prints at the end of a run: the lines that its stage declares."""

from pathlib import Path
from typing import Any

import pytest

from tuner.cli.train import _print_summary
from tuner.config import load_config, to_json
from tuner.stages.run import Run

BEFORE_AND_AFTER = {"before": {"score": None, "loss": 2.0}, "after": {"score": 0.25, "loss": 1.5}}
POLICY = {
    "score": {"before": 0.5, "after": 1.5},
    "gold": {"before": 0.1, "after": 0.75},
    "replay": {"before": 2.0, "after": None},
    "conditions": {"polite": {"score": {"before": 0.0, "after": 1.0}}},
    "positions": [],
}
REWARD = {
    "seen": {"accuracy": 0.9, "twins": None},
    "overall": {"accuracy": 0.875, "interval": [0.8, 0.9], "margin": 1.0, "ece": 0.03125, "rows": 40},
    "conditions": {"polite": {"accuracy": 1.0}},
    "verdict": [],
    "failed": False,
}
POLICY_LINES = [
    "before:  score 0.5000  gold 0.1000  replay loss 2.0000",
    "after:   score 1.5000  gold 0.7500",
]


@pytest.mark.parametrize(
    ("stage", "results", "lines"),
    [
        ("sft", BEFORE_AND_AFTER, ["before:  loss 2.0000", "after:   score 0.2500  loss 1.5000"]),
        ("dpo", {"before": {}, "after": {"margin": 0.5}}, ["after:   margin 0.5000"]),
        (
            "reward",
            REWARD,
            ["seen:    accuracy 0.9000", "overall: accuracy 0.8750  margin 1.0000  ece 0.0312"],
        ),
        ("ppo", POLICY, POLICY_LINES),
        ("grpo", POLICY, POLICY_LINES),
        ("rloo", POLICY, POLICY_LINES),
        ("ppo", {"conditions": {}}, []),
    ],
)
def test_a_stage_declares_its_result_lines(
    stage: str,
    results: dict[str, Any],
    lines: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(tmp_path)
    (tmp_path / "config.json").write_text(to_json(load_config(f"quickstart_{stage}")), encoding="utf-8")
    run.finish(results)
    _print_summary(run)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:-3] == lines
    assert printed[-3] == f"model:   {run.model_folder}"
