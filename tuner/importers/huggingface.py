"""The arguments of transformers' Trainer, which LLaMA-Factory and Axolotl pass on, some under names of their own."""

from __future__ import annotations

from tuner.importers.keys import Keys
from tuner.importers.part import Part
from tuner.importers.recipe import Recipe, final_share

OPTIMIZERS = {
    "adamw": (32, False),
    "adamw_apex_fused": (32, False),
    "adamw_hf": (32, False),
    "adamw_torch": (32, False),
    "adamw_torch_fused": (32, False),
    "adamw_8bit": (8, False),
    "adamw_bnb_8bit": (8, False),
    "paged_adamw": (32, True),
    "paged_adamw_32bit": (32, True),
    "paged_adamw_8bit": (8, True),
}
"""Name of an AdamW -> bits of its state, and whether it is paged."""
_FEWER_BITS = {"adamw_torch_8bit": "torchao's 8-bit state", "adamw_torch_4bit": "a 4-bit state"}
_SCHEDULES = {
    "cosine": "Cosine",
    "cosine_with_min_lr": "Cosine",
    "linear": "Linear",
    "constant": "Constant",
    "constant_with_warmup": "Constant",
}


def read_optimizer(keys: Keys, recipe: Recipe, key: str, name: str, lr: float) -> None:
    """The optimizer and its learning rate. key: of the optimizer's name; name, lr: the trainer's defaults."""
    name = keys.text(key, name) or name
    bits, paged = OPTIMIZERS.get(name, (32, False))
    if name in _FEWER_BITS:
        bits = 8
        recipe.decide(
            "optimizer.bits", f"{name} has {_FEWER_BITS[name]}, here it is bitsandbytes' 8-bit state"
        )
    elif name not in OPTIMIZERS:
        keys.lose(key, f"{name}: the optimizer is AdamW; its learning rate may need to be another")
    optimizer = recipe.optimizer
    optimizer["lr"] = keys.number("learning_rate", lr)
    optimizer["weight_decay"] = keys.number("weight_decay", 0.0)
    optimizer["betas"] = (keys.number("adam_beta1", 0.9), keys.number("adam_beta2", 0.999))
    optimizer["eps"] = keys.number("adam_epsilon", 1e-8)
    optimizer["bits"] = bits
    optimizer["paged"] = paged
    norm = keys.number("max_grad_norm", 1.0)
    recipe.training["max_grad_norm"] = norm or ...


def read_schedule(keys: Keys, recipe: Recipe, key: str, name: str, warmup: float) -> None:
    """The schedule. key: of its name; name, warmup: the trainer's defaults."""
    name = keys.text(key, name) or name
    kind = _SCHEDULES.get(name)
    if kind is None:
        kind = "Cosine"
        keys.lose(key, f"{name}: schedules are Cosine, Linear and Constant; this is Cosine")
    ratio, steps = keys.number("warmup_ratio"), keys.number("warmup_steps")
    amount = steps or (warmup if ratio is None and steps is None else ratio) or 0.0
    fields: dict[str, object] = {"warmup": round(amount) if amount >= 1 else amount}
    arguments = keys.part("lr_scheduler_kwargs")
    if arguments is not None and kind == "Cosine":
        lowest, share = arguments.number("min_lr"), arguments.number("min_lr_rate")
        fields["final"] = final_share(share, lowest, recipe.optimizer.fields.get("lr"))
    recipe.schedule = Part(kind, **fields)


def read_length(keys: Keys, recipe: Recipe, key: str, epochs: float) -> None:
    """Epochs and steps. key, epochs: name and default of the number of epochs."""
    steps = keys.integer("max_steps", -1) or -1
    given = keys.has(key)
    recipe.training["epochs"] = keys.number(key, epochs)
    if steps > 0:
        recipe.training["max_steps"] = steps
        if not given:
            recipe.training["epochs"] = 1.0
        recipe.decide(
            "epochs",
            "a run ends after these, too: raise them where `tuner check` counts fewer steps than max_steps",
        )


def read_checkpoint(keys: Keys, recipe: Recipe, every: int | None) -> None:
    """Checkpoints. every: the trainer's default."""
    strategy = keys.text("save_strategy", "steps")
    steps = keys.number("save_steps", every)
    if strategy == "no":
        recipe.checkpoint["every"] = ...
    elif strategy in ("epoch", "best"):
        keys.lose("save_strategy", f"{strategy}: checkpoint.every is in steps, which `tuner check` counts")
    elif steps is not None and steps < 1:
        keys.lose(
            "save_steps",
            f"{steps:g} is a share of the run: checkpoint.every is in steps, which `tuner check` counts",
        )
    elif steps is not None:
        recipe.checkpoint["every"] = round(steps)
    keep = keys.integer("save_total_limit")
    if keep is not None:
        recipe.checkpoint["keep"] = max(1, keep)


def read_evaluation(keys: Keys, recipe: Recipe) -> None:
    """Evaluation during training, once the held-out rows are known."""
    held_out = bool(recipe.validation_files or "split" in recipe.data)
    strategy = (
        keys.text("eval_strategy") or keys.text("evaluation_strategy") or ("steps" if held_out else "no")
    )
    steps = keys.number("eval_steps")
    if held_out and strategy == "steps" and steps is not None and steps >= 1:
        recipe.evaluation["every"] = round(steps)
    elif held_out and steps is not None:
        keys.lose(
            "eval_steps",
            "evaluation.every is in steps; by default there are about ten evaluations over a run",
        )
    if keys.boolean("load_best_model_at_end"):
        if held_out and recipe.stage not in ("dpo", "kto", "ppo"):
            recipe.evaluation["keep_best"] = True
        else:
            keys.lose(
                "load_best_model_at_end", "evaluation.keep_best needs validation rows, and no DPO, KTO or PPO"
            )


def read_validation_share(keys: Keys, recipe: Recipe, key: str) -> None:
    """The share of the rows that is held out."""
    size = keys.number(key, 0.0) or 0.0
    if 0 < size < 1:
        recipe.data["split"] = Part("Split", validation=size)
    elif size >= 1:
        keys.lose(key, f"{size:g} rows: here it is a share of the rows: data.split=Split(validation=0.02)")


def read_precision(keys: Keys, recipe: Recipe) -> None:
    """bf16, or what took its place."""
    bf16 = keys.take("bf16")
    if keys.boolean("fp16"):
        recipe.decide("precision", "it was fp16; bf16 needs no loss scaling")
        recipe.training["precision"] = "bf16"
    elif bf16 is False:
        recipe.training["precision"] = "fp32"
    if keys.boolean("pure_bf16"):
        recipe.decide("precision", "weights were trained in bf16, too; here in fp32, with products in bf16")
        recipe.training["precision"] = "bf16"
