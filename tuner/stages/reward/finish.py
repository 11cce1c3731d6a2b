"""The end of a reward model's training: its report card, and the record saved with its weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from tuner.config import RewardModel
from tuner.data.conditions import read_conditions
from tuner.display.card_page import html
from tuner.evaluation.report_card.card import ReportCard
from tuner.evaluation.report_card.tables import tables
from tuner.models.load import Loaded
from tuner.models.reward_record import RewardRecord, set_score_token, write_reward_record
from tuner.models.roles import Roles
from tuner.stages.context import Context
from tuner.stages.model_folder import write_model_folder
from tuner.stages.reward.evaluate import Report, make_report, report_results
from tuner.training.loop import Loop


def finish_reward(config: RewardModel, context: Context, roles: Roles, loop: Loop) -> None:
    """Measure the trained model, and save it with the record that scoring needs."""
    report = make_report(config, roles, context.devices)
    record = make_record(config, report)
    for sentence in record.verdict or ():
        loop.say(sentence)
    if report is None:
        loop.say("there are no test rows to report on: add data.test_files or data.split=Split(test=0.02)")
    if context.devices.is_main and report:
        write_report(context.run.folder, report.card)
        context.watchers.report(tables(report.card))
    results = report_results(report)
    context.finish(results, partial(write_reward_model, config, roles.loaded, record=record), roles.loaded)


def write_reward_model(
    config: RewardModel, loaded: Loaded, folder: Path, record: RewardRecord | None = None
) -> None:
    """Write a reward model's folder. record: None: one without a report card."""
    # Before saving: other tools find the score by the padding token in config.json, ours by reward.json.
    set_score_token(loaded, config.reward_token)
    write_record = partial(write_reward_record, record=record or make_record(config, None))
    write_model_folder(loaded, config.data.template, folder, write_record)


def make_record(config: RewardModel, report: Report | None) -> RewardRecord:
    """The record to write as the model's reward.json."""
    return RewardRecord(
        reward_token=config.reward_token,
        conditions={name: wordings.seen for name, wordings in read_conditions(config.conditions).items()},
        seed=config.seed,
        max_length=config.data.max_length,
        spelled_tokens=config.data.spelled_tokens,
        bound=config.loss.bound if config.loss.barrier else None,
        reference=None if report is None else report.reference,
        verdict=None if report is None else report.card.verdict,
    )


def write_report(folder: Path, card: ReportCard) -> None:
    """report.json and report.html in a run's folder."""
    (folder / "report.json").write_text(json.dumps(card.to_dict(), ensure_ascii=False), encoding="utf-8")
    (folder / "report.html").write_text(html(card, folder.name), encoding="utf-8")
