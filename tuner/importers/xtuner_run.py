"""XTuner 0.2's schedules, length of a run, hooks, checkpoints and trackers."""

from __future__ import annotations

from typing import Any

from tuner.importers.keys import Keys
from tuner.importers.part import Part
from tuner.importers.recipe import Recipe, final_share
from tuner.importers.xtuner_data import type_name
from tuner.importers.xtuner_keys import LOST


def read_schedule(top: Keys, recipe: Recipe, accumulation: int) -> None:
    """The schedule and the length of the run. accumulation: iterations per optimizer step, which XTuner counts in."""
    epochs, iterations = _read_length(top, recipe, accumulation)
    lr = recipe.optimizer.fields.get("lr", 2e-4)
    kind, fields = "Constant", dict[str, Any](warmup=0.0)
    for scheduler in top.parts("param_scheduler"):
        name = type_name(scheduler)
        end = scheduler.number("end")
        by_epoch = scheduler.boolean("by_epoch", True)
        for key in ("begin", "convert_to_iter_based", "T_max", "verbose"):
            scheduler.take(key)
        if name == "LinearLR" and kind == "Constant":
            kind = "Constant"
            fields["warmup"] = _warmup(end, by_epoch, epochs, iterations, accumulation)
            start = scheduler.number("start_factor", 1e-5) or 0.0
            if start >= 1e-3:
                fields["warmup_start"] = start
        elif name == "CosineAnnealingLR":
            kind = "Cosine"
            ratio, lowest = scheduler.number("eta_min_ratio"), scheduler.number("eta_min", 0.0)
            fields["final"] = final_share(ratio, lowest, lr)
        elif name != "ConstantLR":
            scheduler.lose("type", f"{name}: schedules are Cosine, Linear and Constant")
    recipe.schedule = Part(kind, **fields)


def _read_length(top: Keys, recipe: Recipe, accumulation: int) -> tuple[float, float | None]:
    """(epochs, iterations): of the run, the second None where epochs set it."""
    train = top.part("train_cfg")
    epochs = iterations = None
    if train is not None:
        type_name(train)
        epochs, iterations = train.number("max_epochs"), train.number("max_iters")
        for key in ("val_interval", "by_epoch", "val_begin"):
            train.take(key)
    if iterations:
        recipe.training["max_steps"] = max(1, round(iterations / accumulation))
        recipe.decide("max_steps", f"{iterations:g} iterations, of which {accumulation} made a step")
        recipe.training["epochs"] = 1.0
        recipe.decide(
            "epochs",
            "a run ends after these, too: raise them where `tuner check` counts fewer steps than max_steps",
        )
    elif epochs:
        recipe.training["epochs"] = epochs
    return epochs or 1.0, iterations


def _warmup(
    end: float | None, by_epoch: bool, epochs: float, iterations: float | None, accumulation: int
) -> float | int:
    """Warm-up as a fraction of the run, or in optimizer steps where it was in iterations."""
    if not end or end < 0:
        return 0.0
    if by_epoch:
        return round(min(0.99, end / epochs), 6)
    return round(min(0.99, end / iterations), 6) if iterations else max(1, round(end / accumulation))


def read_runtime(top: Keys, recipe: Recipe, accumulation: int) -> None:
    """Checkpoints, hooks, seed and trackers. accumulation: iterations per optimizer step, which XTuner counts in."""
    hooks = top.part("default_hooks")
    checkpoint = None if hooks is None else hooks.part("checkpoint")
    if hooks is not None:
        for key in ("timer", "logger", "param_scheduler", "sampler_seed", "runtime_info", "visualization"):
            if hooks.has(key):
                hooks.ignore(key, "every step is logged, and the seed is in the config")
    if checkpoint is not None:
        type_name(checkpoint)
        every, by_epoch = checkpoint.number("interval"), checkpoint.boolean("by_epoch", True)
        if every and every > 0 and not by_epoch:
            recipe.checkpoint["every"] = max(1, round(every / accumulation))
            if accumulation > 1:
                recipe.decide(
                    "checkpoint.every", f"{every:g} iterations, of which {accumulation} made a step"
                )
        elif every and every < 0:
            recipe.checkpoint["every"] = ...
        elif every:
            checkpoint.lose(
                "interval", "is in epochs, and checkpoint.every in steps; `tuner check` counts them"
            )
        keep = checkpoint.integer("max_keep_ckpts", -1) or -1
        if keep > 0:
            recipe.checkpoint["keep"] = keep
        elif checkpoint.has("max_keep_ckpts"):
            checkpoint.lose(
                "max_keep_ckpts",
                "all checkpoints cannot be kept: write a number as checkpoint.keep, or milestones",
            )
        checkpoint.take("save_last")
    for hook in top.parts("custom_hooks"):
        _read_hook(hook)
    randomness = top.part("randomness")
    if randomness is not None:
        recipe.training["seed"] = randomness.integer("seed")
        if randomness.boolean("deterministic"):
            recipe.training["deterministic"] = True
    visualizer = top.part("visualizer")
    if visualizer is not None:
        _read_visualizer(visualizer, recipe)


def _read_hook(hook: Keys) -> None:
    name = type_name(hook)
    if name == "EvaluateChatHook":
        for key in ("tokenizer", "every_n_iters", "prompt_template", "system", "max_new_tokens", "stop_word"):
            if hook.has(key):
                hook.ignore(key, "validation prompts are answered at each evaluation")
        inputs = hook.take("evaluation_inputs")
        if inputs:
            hook.lose("evaluation_inputs", LOST["evaluation_inputs"])
    elif name in ("DatasetInfoHook", "VarlenAttnArgsToMessageHubHook", "ThroughputHook", "HFCheckpointHook"):
        if hook.has("tokenizer"):
            hook.ignore("tokenizer", "the model's own")
        hook.ignore("type", f"{name}: `tuner data` shows the rows; throughput is logged; a run is a model")
    else:
        hook.lose("type", f"{name}: write it as a watcher (docs/extending.md)")


def _read_visualizer(visualizer: Keys, recipe: Recipe) -> None:
    type_name(visualizer)
    for backend in visualizer.parts("vis_backends"):
        name = type_name(backend)
        if name == "WandbVisBackend":
            init = backend.part("init_kwargs")
            values = {} if init is None else {key: init.text(key) for key in ("project", "entity", "group")}
            recipe.training["tracking"] = Part("Wandb", **values)
        else:
            backend.ignore("type", f"{name}: curves are in the run's folder; W&B is tracking=Wandb()")
