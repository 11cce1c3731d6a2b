"""The report card of a reward model on its test rows."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np

from tuner.config import RewardModel
from tuner.data.conditions import CONTROLS, Conditions, Presentation, read_conditions
from tuner.display.card_page import html, terminal
from tuner.display.progress import progress_bar
from tuner.errors import DivergedError, UserError
from tuner.evaluation.held_out_pairs import score_comparisons
from tuner.evaluation.report_card.card import NO_CONDITION, ReportCard
from tuner.evaluation.report_card.make import ReportSettings, Scoring, report_on
from tuner.evaluation.report_card.tables import results
from tuner.models.reward_record import Reference, unasked
from tuner.models.roles import Roles
from tuner.printable import echo
from tuner.stages.finished_model import load_finished
from tuner.stages.run import Run
from tuner.stages.stage import Evaluation
from tuner.training.devices import Devices


@dataclass(frozen=True)
class Report:
    """A report card, and the distribution of the scores it summarizes."""

    card: ReportCard
    reference: Reference


def make_report(
    config: RewardModel, roles: Roles, devices: Devices, *, controls: Sequence[Presentation] = CONTROLS
) -> Report | None:
    """The report on a config's test rows; None without such rows. controls: those to measure."""
    conditions = Conditions(read_conditions(config.conditions), config.seed)

    @contextmanager
    def scoring(answers: int) -> Generator[Scoring]:
        bar = progress_bar("Scoring held-out answers", answers) if devices.is_main else nullcontext(_silent)
        with bar as advance:
            # the others score about as many answers at a time
            yield lambda rows: _finite(
                score_comparisons(
                    rows,
                    roles,
                    devices,
                    config.tokens_per_pass,
                    lambda count: advance(count * devices.world),
                )
            )

    settings = ReportSettings(config.data, config.reward_token, config.evaluation, config.loss)
    report = report_on(settings, roles.tokenizer, conditions, scoring, controls=controls)
    return None if report is None else Report(*report)


def _silent(count: int) -> None:
    """The bar of a rank that shows none."""


def _finite(scores: np.ndarray) -> np.ndarray:
    if not np.isfinite(scores).all():
        raise DivergedError(
            f"this reward model gives {int((~np.isfinite(scores)).sum())} of {len(scores)} held-out answers a score "
            "that is not finite, so it is no model; train again with a lower optimizer.lr"
        )
    return scores


def _unconditioned(card: ReportCard) -> int:
    """Rows of a report that name no condition."""
    if not card.conditions:  # there are groups where any row names one
        return 0 if card.overall is None else card.overall.accuracy.rows
    return sum(group.accuracy.rows for group in card.conditions if group.name == NO_CONDITION)


def report_results(report: Report | None) -> dict[str, object]:
    """The entries of results.json for a report; none without test rows."""
    if report is None:
        return {}
    reference = report.reference
    return {
        **results(report.card),
        "reference": {"mean": reference.mean, "standard_deviation": reference.standard_deviation},
    }


def evaluate(run: Run, config: RewardModel) -> Evaluation:
    """The report card of a finished run's model. Raises UserError without test rows."""
    devices, roles = load_finished(run, config, "reward", head="score")
    report = make_report(config, roles, devices)
    if report is None:
        raise UserError(f"{run.folder}: its config holds out no test rows; name some with --files")
    for sentence in unasked(
        list(config.conditions), _unconditioned(report.card), "name one with Source(condition=...)"
    ):
        echo(f"tuner: {sentence}", sys.stderr)
    title = run.folder.name
    return Evaluation(title, report_results(report), terminal(report.card), lambda: html(report.card, title))
