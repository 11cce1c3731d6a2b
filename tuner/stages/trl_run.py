"""A run by one of TRL's trainers: what DPO and KTO have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset as TRLDataset

from tuner.config import SingleModelConfig
from tuner.data.dataset import Dataset
from tuner.data.load_pairs import answer_suffix
from tuner.data.subset import stratified_subset
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.models.adapters import trains_rows_of_head
from tuner.models.load import Loaded, load_model
from tuner.models.memory import MemoryPlan
from tuner.models.roles import Roles
from tuner.stages.check import CheckedModel, CheckReport, check_model, model_figures
from tuner.stages.context import Context
from tuner.stages.model_folder import write_model_folder
from tuner.stages.stage import Stage
from tuner.training.divergence import refuse_weights
from tuner.training.evaluation_cost import evaluation_interval, interval_sentences
from tuner.training.pair_plan import PairPlan
from tuner.training.resume_rules import extension_sentences, reach_sentences
from tuner.training.schedules import learning_rate
from tuner.training.trl_callback import RunCallback
from tuner.training.trl_trainer import RunTrainer, holds_reference, last_checkpoint, step_of

MakeDataset = Callable[[Any, np.ndarray], TRLDataset]
"""From a part's rows, and the tokens to remove from the end of answers, to TRL's columns."""
MakeTrainer = Callable[[Loaded, TRLDataset], RunTrainer]
MakePlan = Callable[[int, int], PairPlan]
"""From the numbers of training rows and of processes to the run's plan."""


def train_with_trl(
    config: SingleModelConfig,
    context: Context,
    make_dataset: MakeDataset,
    make_trainer: MakeTrainer,
    plan: MakePlan,
) -> None:
    """Train the config's model to the end with a trainer of TRL's, from the last checkpoint where there is one."""
    policy = _load_policy(config, context)
    train, validation, test = _load_rows(config, context, policy, make_dataset)
    assert train is not None  # data without a row to train on is refused
    checkpoint, sentences = _last_checkpoint(config, context)
    trainer = make_trainer(policy.loaded, train)
    # before a checkpoint is loaded: the reference is the model as it starts
    validation, test = (trainer.with_reference(part) for part in (validation, test))
    context.watchers.begin(context.run.folder, config, step_of(checkpoint), trainer.args.max_steps)
    planned, max_steps = plan(len(train), context.devices.world), trainer.args.max_steps
    sentences += reach_sentences(config.max_steps, planned.planned, config.epochs)
    evaluated = 0 if validation is None else len(validation)
    interval = evaluation_interval(max_steps, evaluated, planned.seen)
    if evaluated and trainer.settings.evaluation.every is None:
        sentences += interval_sentences(max_steps, interval)
    context.say_all([*sentences, *_extension_sentences(config, context, trainer, step_of(checkpoint))])
    trainer.signals.agree(context.devices)
    callback = RunCallback(
        *(trainer, context.run, context.devices, context.watchers),
        validation=validation,
        evaluation_interval=interval,
        on_start=lambda: _measure("before", context, trainer, test),
    )
    trainer.train_from(checkpoint, callback)
    _note_early_end(context, trainer)
    refuse_weights(context.run.folder, policy.trained())
    after = _measure("after", context, trainer, test)
    # Before saving: TRL leaves its reference adapter and its own settings in the model.
    trainer.restore_model()
    results = {"before": context.run.read_json("before"), "after": after}
    template: str = config.data.template  # type: ignore[attr-defined]
    context.finish(results, partial(write_model_folder, policy.loaded, template))


def check_with_trl(
    stage: Stage[Any], config: Any, plan_figures: Callable[[Any, Dataset[Any]], dict[str, Any]]
) -> CheckReport:
    """The dry run of a stage; see Stage.check. plan_figures: of a config and its rows, as CheckReport has them."""
    model = check_model(config)
    check_head(model.loaded)
    rows = stage.load_rows(config, model.loaded.tokenizer)
    return model.report(rows, plan_figures(config, rows), further=_beside_model(model))


def memory_with_trl(config: Any) -> Callable[[Any], MemoryPlan]:
    """See Stage.memory_plans."""
    model = check_model(config)
    return partial(model.memory, further=_beside_model(model))


def _beside_model(model: CheckedModel) -> dict[str, float]:
    """Bytes of the reference: an adapter's is small; that of full weights is an fp32 copy of them."""
    if not holds_reference(model.config, model.loaded):
        return {}
    return {"reference in fp32": 4.0 * model_figures(model.loaded)["parameters"]}


def check_head(loaded: Loaded) -> None:
    """UserError where an adapter trains single rows of the head: TRL computes losses from its plain matrix."""
    if trains_rows_of_head(loaded.model):
        raise UserError(
            "TRL cannot train an adapter that trains single rows of the head (model.resize_embeddings, "
            "trainable_token_indices): write adapter=null, or train the new tokens by SFT first, and name its merged "
            "folder"
        )


def _load_policy(config: SingleModelConfig, context: Context) -> Roles:
    loaded = load_model(
        config.model,
        precision=config.precision,
        device=context.devices.device,
        adapter=config.adapter,
        seed=config.seed,
    )
    if context.devices.is_main:
        context.run.pin("base", loaded.base.fingerprint, path=loaded.base.path)
    context.say_all(loaded.notes)
    check_head(loaded)
    return Roles.of("policy", loaded, context.devices.autocast)


def _load_rows(
    config: Any, context: Context, policy: Roles, make_dataset: MakeDataset
) -> list[TRLDataset | None]:
    """Rows for training, validation and test, as TRL's datasets; None where there are none."""
    data: Dataset[Any] = context.load_rows(config, policy)
    suffix = answer_suffix(Template(config.data.template, policy.tokenizer), policy.tokenizer)
    parts = (
        data.train,
        *(stratified_subset(part, config.evaluation.rows) for part in (data.validation, data.test)),
    )
    return [None if part is None else make_dataset(part, suffix) for part in parts]


def _last_checkpoint(config: SingleModelConfig, context: Context) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from (None at the start), and what the user must know of it.

    The run's records are cut back to it.
    """
    run, checkpoint, sentences = context.run, None, list[str]()
    if context.devices.is_main:
        checkpoint, sentences = last_checkpoint(run.checkpoints_folder, config.checkpoint.skip_damaged)
        sentences += run.rewind(step_of(checkpoint))
        if checkpoint:
            run.log(f"going on after step {step_of(checkpoint)}")
    return context.devices.gather([(checkpoint, sentences)])[0]


def _extension_sentences(
    config: SingleModelConfig, context: Context, trainer: RunTrainer, step: int
) -> list[str]:
    """Sentences on a run that is longer than it was when it was begun."""
    run, total = context.run, trainer.args.max_steps
    record = next((record for record in reversed(run.metrics) if record["step"] == step), None)
    if not run.extension or record is None:
        return []
    rate = learning_rate(config.schedule, config.optimizer.lr, step, total)
    # the epoch as it is: transformers ends every epoch with a step of its own, so none is cut short
    return extension_sentences(
        run.extension, record, total_steps=total, rates={"lr": rate}, epoch=record["epoch"]
    )


def _note_early_end(context: Context, trainer: RunTrainer) -> None:
    steps = (context.run.metrics or [{"step": 0}])[-1]["step"]
    if trainer.signals.ends and steps < trainer.args.max_steps:
        context.say(context.run.end_early(steps, trainer.args.max_steps))


def _measure(when: str, context: Context, trainer: RunTrainer, test: Any) -> dict[str, float]:
    """The test rows' measures now, which are also logged. when: "before" or "after" training."""
    measures = trainer.measure(test)
    text = ", ".join(f"{name} {value:.4f}" for name, value in measures.items()) or "no test rows to measure"
    context.say(f"{when} training: {text}")
    if context.devices.is_main and when == "before":
        context.run.save_json(when, measures)
    return measures
