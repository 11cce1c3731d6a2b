"""EvaluationBase a finished run again, on its own held-out rows or on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from tuner.config import PPO, SFT, RewardModel, StageConfig, override
from tuner.data.dataset import Dataset
from tuner.display.card_page import html, terminal
from tuner.display.win_page import policy_html, policy_terminal
from tuner.errors import UserError
from tuner.evaluation.report_card.card import ReportCard
from tuner.evaluation.win_rate import PolicyCard
from tuner.evaluation.win_rate import results as policy_results
from tuner.models.load import load_model
from tuner.models.roles import Roles
from tuner.stages.job import held_out_rows
from tuner.stages.reward.finish import outcome, report
from tuner.stages.rl.policy_evaluation import compare_policies
from tuner.stages.rows import load_rows
from tuner.training.devices import Devices
from tuner.training.run_folder import Run


@dataclass(frozen=True)
class Evaluated:
    """What was measured."""

    title: str
    results: Mapping[str, Any]
    """Plain values, as results.json has them."""
    card: ReportCard | PolicyCard | None = None
    """Of reward models, and of PPO's policies."""

    def page(self) -> str:
        """The card as one page of HTML. Raises UserError where there is none."""
        if self.card is None:
            raise UserError(f"{self.title}: only reward models and PPO runs have a page; leave --html out")
        if isinstance(self.card, PolicyCard):
            return policy_html(self.card, self.title)
        return html(self.card, self.title)

    def shown(self) -> RenderableType:
        """For a console."""
        if self.card is None:
            return "  ".join(
                f"{name} {value:.4f}" for name, value in self.results.items() if value is not None
            )
        return policy_terminal(self.card) if isinstance(self.card, PolicyCard) else terminal(self.card)


def evaluate_run(
    folder: Path, files: tuple[str, ...] = (), against: Sequence[str] = (), *, page: bool = False
) -> Evaluated:
    """Measure a finished run's model on its test rows, or on `files`; a PPO run's also against other policies.

    against: runs, model folders or hub names, which answer the same prompts. page: whether `page` is going to be
    asked for, so that a run that has none is refused before it is measured. Raises UserError when it has not
    finished, there is nothing to measure on, or it has no policy to compare.
    """
    run = Run(folder)
    config = run.config
    if against and not isinstance(config, PPO):
        raise UserError(
            f"{folder}: only a PPO run says which prompts, reward model and rule to compare by, and this is "
            f"a run of {type(config).__name__}; name the PPO run first, and this one with --against"
        )
    if page and not isinstance(config, PPO | RewardModel):
        raise UserError(f"{folder}: only reward models and PPO runs have a page; leave --html out")
    if not run.model_folder.is_dir():
        raise UserError(
            f"{folder}: this run has not finished, so it has no model to measure; train it to its end"
        )
    if files:
        rows = "prompts" if isinstance(config, PPO) else "data"
        config = override(config, {f"{rows}.test_files": list(files), f"{rows}.split.test": 0.0})
    if isinstance(config, PPO):
        card = compare_policies(folder, config, run.model_folder, against)
        return Evaluated(folder.name, policy_results(card), card)
    measure = {SFT: _conversations, RewardModel: _preferences}.get(type(config))
    if measure is None:
        raise UserError(f"{folder}: a run of {type(config).__name__} has its measures in results.json")
    return measure(folder, config, run.model_folder)  # type: ignore[arg-type]


def _conversations(folder: Path, config: SFT, model: Path) -> Evaluated:
    devices = Devices.of(config)
    roles = _roles("policy", config, model, devices)
    data: Dataset[Any] = load_rows(config, roles.tokenizer)
    if data.test is None:
        raise UserError(f"{folder}: its config holds out no test rows; name some with --files")
    rows = held_out_rows(config, roles, devices, data.test)
    return Evaluated(folder.name, {"score": rows.score(), "loss": rows.loss()})


def _preferences(folder: Path, config: RewardModel, model: Path) -> Evaluated:
    devices = Devices.of(config)
    reported = report(config, _roles("reward", config, model, devices), devices)
    if reported is None:
        raise UserError(f"{folder}: its config holds out no test rows; name some with --files")
    return Evaluated(folder.name, outcome(reported), reported[0])


def _roles(name: str, config: StageConfig, model: Path, devices: Devices) -> Roles:
    asked = override(config, {"model": {"path": str(model)}, "adapter": None}).model  # type: ignore[attr-defined]
    loaded = load_model(
        asked,
        precision=config.precision,
        device=devices.device,
        train=False,
        head="score" if name == "reward" else "language",
    )
    return Roles.of(name, loaded, devices.autocast)
