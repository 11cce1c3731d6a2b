"""Measuring a finished run again, on its own held-out rows or on others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from tuner.config import SFT, RewardModel, Stage, override
from tuner.data.load import Dataset
from tuner.errors import UserError
from tuner.evaluation.report.card import ReportCard
from tuner.evaluation.report.page import html, terminal
from tuner.models.load import load_model
from tuner.models.roles import Roles
from tuner.stages.job import held_out_rows
from tuner.stages.report import outcome, report
from tuner.stages.rows import load_rows
from tuner.training.devices import Devices
from tuner.training.run import Run


@dataclass(frozen=True)
class Evaluated:
    """What was measured."""

    title: str
    results: Mapping[str, Any]
    """Plain values, as results.json has them."""
    card: ReportCard | None = None
    """Of reward models."""

    def page(self) -> str:
        """The report card as one page of HTML. Raises UserError where there is none."""
        if self.card is None:
            raise UserError(f"{self.title}: only reward models have a report card; leave --html out")
        return html(self.card, self.title)

    def shown(self) -> RenderableType:
        """For a console."""
        if self.card is not None:
            return terminal(self.card)
        return "  ".join(f"{name} {value:.4f}" for name, value in self.results.items() if value is not None)


def evaluate_run(folder: Path, files: tuple[str, ...] = ()) -> Evaluated:
    """Measure a finished run's model on its test rows, or on `files`.

    Raises UserError when it has not finished, or there is nothing to measure on.
    """
    run = Run(folder)
    config = run.config
    if not run.model_folder.is_dir():
        raise UserError(
            f"{folder}: this run has not finished, so it has no model to measure; train it to its end"
        )
    if files:
        config = override(config, {"data.test_files": list(files), "data.split.test": 0.0})
    measure = {SFT: _conversations, RewardModel: _preferences}.get(type(config))
    if measure is None:
        raise UserError(f"{folder}: a {type(config).__name__} run has its measures in results.json")
    return measure(folder, config, run.model_folder)  # type: ignore[arg-type]


def _conversations(folder: Path, config: SFT, model: Path) -> Evaluated:
    devices = Devices(config)
    roles = _roles("policy", config, model, devices)
    data: Dataset[Any] = load_rows(config, roles.tokenizer)
    if data.test is None:
        raise UserError(f"{folder}: its config holds out no test rows; name some with --files")
    rows = held_out_rows(config, roles, devices, data.test)
    return Evaluated(folder.name, {"score": rows.score(), "loss": rows.loss()})


def _preferences(folder: Path, config: RewardModel, model: Path) -> Evaluated:
    devices = Devices(config)
    reported = report(config, _roles("reward", config, model, devices), devices)
    if reported is None:
        raise UserError(f"{folder}: its config holds out no test rows; name some with --files")
    return Evaluated(folder.name, outcome(reported), reported[0])


def _roles(name: str, config: Stage, model: Path, devices: Devices) -> Roles:
    asked = override(config, {"model": {"path": str(model)}, "adapter": None}).model  # type: ignore[attr-defined]
    loaded = load_model(
        asked,
        precision=config.precision,
        device=devices.device,
        train=False,
        head="score" if name == "reward" else "language",
    )
    return Roles.of(name, loaded, devices.autocast)
