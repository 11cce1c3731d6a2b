"""Direct preference optimization (arXiv 2305.18290): a thin stage on TRL's DPOTrainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tuner.config import DPO
from tuner.data.load_pairs import answer_suffix, pairs
from tuner.data.subset import stratified_subset
from tuner.data.template import Template
from tuner.models.load import load_model
from tuner.models.roles import Roles
from tuner.stages.context import Context
from tuner.stages.dpo.plan import plan_pairs
from tuner.stages.dpo.trainer import Trainer, make_dataset, make_trainer
from tuner.stages.model_folder import write_model_folder
from tuner.training.divergence import refuse_weights
from tuner.training.resume_rules import extension_sentences, reach_sentences
from tuner.training.schedules import learning_rate
from tuner.training.trl_callback import RunCallback
from tuner.training.trl_trainer import last_checkpoint, step_of


def dpo(config: DPO, context: Context) -> None:
    """Train the policy to prefer the rows' better answers, with a penalty on its distance from the reference.

    `margin` is beta times how much more log-probability the better answer has gained than the worse one since the
    start; `accuracy` is the share of pairs where it is positive. Before the first step both are 0, and the loss of
    "sigmoid" is log 2.
    """
    policy = _load_policy(config, context)
    train, validation, test = _load_pairs(config, context, policy)
    checkpoint, sentences = _last_checkpoint(config, context)
    trainer = make_trainer(config, policy.loaded, train, context.run, context.devices)
    context.watchers.begin(context.run.folder, config, step_of(checkpoint), trainer.args.max_steps)
    planned = plan_pairs(config, len(train), context.devices.world).planned
    sentences += reach_sentences(config.max_steps, planned, config.epochs)
    for sentence in [*sentences, *_extension_sentences(config, context, trainer, step_of(checkpoint))]:
        context.say(sentence)
    trainer.signals.agree(context.devices)
    callback = RunCallback(
        *(trainer, context.run, context.devices, context.watchers),
        validation=validation,
        on_start=lambda: _measure("before", context, trainer, test),
    )
    trainer.train_from(checkpoint, callback)
    _note_early_end(context, trainer)
    refuse_weights(context.run.folder, policy.trained())
    after = _measure("after", context, trainer, test)
    # Before saving: TRL leaves its reference adapter and its own settings in the model.
    trainer.restore_model()
    results = {"before": context.run.read_json("before"), "after": after}
    context.finish(results, partial(write_model_folder, policy.loaded, config.data.template))


def _load_policy(config: DPO, context: Context) -> Roles:
    loaded = load_model(
        config.model,
        precision=config.precision,
        device=context.devices.device,
        adapter=config.adapter,
        seed=config.seed,
    )
    if context.devices.is_main:
        context.run.pin("base", loaded.base.fingerprint, path=loaded.base.path)
    return Roles.of("policy", loaded, context.devices.autocast)


def _load_pairs(config: DPO, context: Context, policy: Roles) -> list[Any]:
    """Pairs for training, validation and test, as TRL's datasets; None where there are none."""
    data = context.load_rows(config, policy)
    tail = answer_suffix(Template(config.data.template, policy.tokenizer), policy.tokenizer)
    parts = (
        data.train,
        *(stratified_subset(part, config.evaluation.rows) for part in (data.validation, data.test)),
    )
    return [None if part is None else make_dataset(pairs(part, tail)) for part in parts]


def _last_checkpoint(config: DPO, context: Context) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from (None at the start), and what the user must know of it.

    The run's records are cut back to it.
    """
    run, found = context.run, (None, list[str]())
    if context.devices.is_main:
        found = last_checkpoint(run.checkpoints_folder, config.checkpoint.skip_damaged)
        found[1].extend(run.rewind(step_of(found[0])))
        if found[0]:
            run.log(f"going on after step {step_of(found[0])}")
    return context.devices.gather([found])[0]


def _extension_sentences(config: DPO, context: Context, trainer: Trainer, step: int) -> list[str]:
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


def _note_early_end(context: Context, trainer: Trainer) -> None:
    steps = (context.run.metrics or [{"step": 0}])[-1]["step"]
    if trainer.signals.ends and steps < trainer.args.max_steps:
        context.say(context.run.end_early(steps, trainer.args.max_steps))


def _measure(when: str, context: Context, trainer: Trainer, test: Any) -> dict[str, float]:
    """The test pairs' loss, accuracy and margin now, which are also logged. when: "before" or "after" training."""
    measures = trainer.measure(test)
    text = ", ".join(f"{name} {value:.4f}" for name, value in measures.items()) or "no test pairs to measure"
    context.say(f"{when} training: {text}")
    if context.devices.is_main and when == "before":
        context.run.save_json(when, measures)
    return measures
