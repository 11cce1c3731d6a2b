"""The end of a reward model's training, and any later look at it: report card, reference, and what is written."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from tuner.config import RewardModel
from tuner.data.conditions import Conditions, read_conditions
from tuner.display.card_page import html
from tuner.display.progress import progress_bar
from tuner.evaluation.held_out_pairs import score_comparisons
from tuner.evaluation.report_card.card import ReportCard
from tuner.evaluation.report_card.make import report_on
from tuner.evaluation.report_card.tables import results, tables
from tuner.models.reward_record import Reference, RewardRecord, set_score_token, write_reward_record
from tuner.models.roles import Roles
from tuner.stages.job import Job
from tuner.training.devices import Devices
from tuner.training.loop import Loop

Reported = tuple[ReportCard, Reference]


def finish_reward(config: RewardModel, job: Job, roles: Roles, loop: Loop) -> None:
    """Measure the trained model, and write it with what it needs to be asked."""
    reported = report(config, roles, job.devices)
    record = make_record(config, reported)
    for sentence in record.verdict or ():
        loop.say(sentence)
    if reported is None:
        loop.say("there are no test rows to report on: add data.test_files or data.split=Split(test=0.02)")
    if job.devices.is_main and reported:
        write_report(job.run.folder, reported[0])
        job.watchers.report(tables(reported[0]))
    set_score_token(roles.loaded, config.reward_token)
    beside = partial(write_reward_record, record=record)
    job.finish(config.data.template, roles, outcome(reported), beside)


def report(config: RewardModel, roles: Roles, devices: Devices) -> Reported | None:
    """The report card of a config's test rows and the reference of their scores; None without such rows."""
    conditions = Conditions(read_conditions(config.conditions), config.seed)
    bar = (
        progress_bar("Scoring held-out answers", None) if devices.is_main else nullcontext(lambda count: None)
    )
    with bar as advance:
        return report_on(
            config,
            roles.tokenizer,
            conditions,
            lambda rows: score_comparisons(rows, roles, devices, config.tokens_per_pass, advance),
        )


def make_record(config: RewardModel, reported: Reported | None) -> RewardRecord:
    """What the model says of itself."""
    card, reference = reported or (None, None)
    return RewardRecord(
        reward_token=config.reward_token,
        conditions={name: one.seen for name, one in read_conditions(config.conditions).items()},
        seed=config.seed,
        max_length=config.data.max_length,
        bound=config.loss.bound if config.loss.barrier else None,
        reference=reference,
        verdict=None if card is None else card.verdict,
    )


def outcome(reported: Reported | None) -> dict[str, object]:
    """What results.json holds."""
    if reported is None:
        return {}
    card, reference = reported
    statistics = {"mean": reference.mean, "standard_deviation": reference.standard_deviation}
    return {**results(card), "reference": statistics}


def write_report(folder: Path, card: ReportCard) -> None:
    """report.json and report.html in a run's folder."""
    (folder / "report.json").write_text(json.dumps(card.to_dict(), ensure_ascii=False), encoding="utf-8")
    (folder / "report.html").write_text(html(card, folder.name), encoding="utf-8")
