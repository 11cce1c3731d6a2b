"""Direct preference optimization: a thin stage on TRL's DPOTrainer, the alternative to a reward model and PPO."""

from __future__ import annotations

from typing import Any

from tuner.config import DPO
from tuner.data.load_pairs import answer_suffix, pairs
from tuner.data.subset import stratified_subset
from tuner.data.template import Template
from tuner.models.load import load_model
from tuner.models.roles import Roles
from tuner.stages.context import Context
from tuner.stages.dpo.trainer import Trainer, make_dataset, make_trainer
from tuner.training.trl_callback import RunCallback
from tuner.training.trl_trainer import last_checkpoint, step_of


def dpo(config: DPO, context: Context) -> None:
    """Teach the policy to prefer what the rows prefer, without going far from what it was.

    `accuracy` is the share of pairs whose better answer has gained more log-probability than the worse one since
    the start, `margin` by how much, times beta: before the first step both are 0, and the loss of "sigmoid" log 2.
    """
    policy = _load_policy(config, context)
    train, validation, test = _load_pairs(config, context, policy)
    checkpoint = _last_checkpoint(context)
    trainer = make_trainer(config, policy.loaded, train, context.run, context.devices)
    context.watchers.begin(context.run.folder, config, step_of(checkpoint), trainer.args.max_steps)
    callback = RunCallback(
        *(trainer, context.run, context.devices, context.watchers),
        validation=validation,
        on_start=lambda: _measure("before", context, trainer, test),
    )
    trainer.train_from(checkpoint, callback)
    after = _measure("after", context, trainer, test)
    trainer.restore_model()
    context.finish(config.data.template, policy, {"before": context.run.read_json("before"), "after": after})


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
    """Pairs to train, validate and test on, as TRL wants them; None where there are none."""
    data = context.load_rows(config, policy)
    tail = answer_suffix(Template(config.data.template, policy.tokenizer), policy.tokenizer)
    parts = (
        data.train,
        *(stratified_subset(part, config.evaluation.rows) for part in (data.validation, data.test)),
    )
    return [None if part is None else make_dataset(pairs(part, tail)) for part in parts]


def _last_checkpoint(context: Context) -> Any:
    """Where the run goes on from, with its records rewound to there; None at its start."""
    checkpoint = last_checkpoint(context.run.checkpoints_folder, context.devices.is_main)
    context.devices.wait()
    if context.devices.is_main:
        context.run.rewind(step_of(checkpoint))
        if checkpoint:
            context.run.log(f"going on after step {step_of(checkpoint)}")
    return checkpoint


def _measure(when: str, context: Context, trainer: Trainer, test: Any) -> dict[str, float]:
    """The test pairs' loss, accuracy and margin now."""
    measured = trainer.measure(test)
    told = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
    if context.devices.is_main:
        for say in (context.run.log, context.watchers.message):
            say(f"{when} training: {told or 'no test pairs to measure'}")
        if when == "before":
            context.run.save_json(when, measured)
    return measured
