"""Loss and score on held-out rows, before and after training and of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tuner.config import SFT, Chat, Text
from tuner.data.dataset import Dataset
from tuner.data.examples import Examples
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.evaluation.held_out_chat import HeldOutRows
from tuner.models.chat import end_ids
from tuner.models.roles import Roles
from tuner.stages.context import Context
from tuner.stages.finished_model import load_finished
from tuner.stages.run import Run
from tuner.stages.stage import Evaluation
from tuner.training.devices import Devices
from tuner.training.loop import Loop

Measures = dict[str, float | None]
"""`score` (0..1) and `loss` (nats per token the loss is taken on); None where there is nothing to measure."""


def held_out_rows(config: SFT, roles: Roles, devices: Devices, rows: Examples | None) -> HeldOutRows:
    """Held-out rows with the tokens that end an answer to them: the chat template's, or the tokenizer's for text."""
    ends = frozenset({roles.tokenizer.eos_token_id} - {None})
    if isinstance(config.data, Chat):
        ends = end_ids(Template(config.data.template, roles.tokenizer), roles.tokenizer)
    return HeldOutRows(rows, roles, devices, config.evaluation, config.tokens_per_pass, ends)


def measure_before(context: Context, rows: HeldOutRows, loop: Loop) -> Measures:
    """Measures before the first step; a resumed run reads them from its before.json."""
    if loop.counters.step:
        saved = context.run.read_json("before")
        if saved is None:
            context.say("before.json is gone, so there is nothing to compare the trained model with")
        return saved or {"score": None, "loss": None}
    measures = measure("before", rows, loop)
    if context.devices.is_main:
        context.run.save_json("before", measures)
    return measures


def measure(when: str, rows: HeldOutRows, loop: Loop) -> Measures:
    """Measures now, which are also logged. when: "before" or "after" training."""
    measures = {"score": rows.score(), "loss": rows.loss()}
    text = ", ".join(f"{name} {value:.4f}" for name, value in measures.items() if value is not None)
    loop.say(f"{when} training: {text or 'no test rows to measure'}")
    return measures


def template_of(config: SFT) -> str | None:
    """The chat template of the rows; None for raw text."""
    return None if isinstance(config.data, Text) else config.data.template


def evaluate(run: Run, config: SFT, load_rows: Callable[..., Dataset[Examples]]) -> Evaluation:
    """Loss and score of a finished run's model on its test rows. Raises UserError without such rows."""
    devices, roles = load_finished(run, config, "policy")
    data = load_rows(config, roles.tokenizer)
    if data.test is None:
        raise UserError(f"{run.folder}: its config holds out no test rows; name some with --files")
    rows = held_out_rows(config, roles, devices, data.test)
    results: dict[str, Any] = {"score": rows.score(), "loss": rows.loss()}
    return Evaluation(run.folder.name, results)
