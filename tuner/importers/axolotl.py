"""Configs of Axolotl (YAML): SFT, pre-training, reward models, DPO, IPO, KTO, ORPO."""

from __future__ import annotations

import re
from pathlib import Path

from tuner.importers import huggingface
from tuner.importers.axolotl_data import read_datasets
from tuner.importers.axolotl_keys import IDLE, KERNELS, LOST
from tuner.importers.keys import Block, Keys
from tuner.importers.lora import lora_part
from tuner.importers.part import Part
from tuner.importers.recipe import Batch, Recipe, Stage

_RL: dict[str, Stage] = {"dpo": "dpo", "ipo": "dpo", "orpo": "dpo", "simpo": "dpo", "kto": "kto"}
_LORA = {
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "lora_target_modules",
    "whole": "lora_modules_to_save",
    "rslora": "peft_use_rslora",
    "dora": "peft_use_dora",
}


def read_axolotl(block: Block, file: Path, recipe: Recipe, devices: int) -> None:
    """Fill a recipe from the keys of an Axolotl config. Raises UserError where it trains what tuner does not."""
    keys = Keys(block, recipe.report, str(file))
    _read_stage(keys, recipe)
    _read_model(keys, recipe)
    read_datasets(keys, recipe)
    _read_rows(keys, recipe)
    _read_batch(keys, recipe, devices)
    huggingface.read_optimizer(keys, recipe, "optimizer", "adamw_torch_fused", 2e-4)
    huggingface.read_schedule(keys, recipe, "lr_scheduler", "cosine", 0.03)
    lowest = keys.number("cosine_min_lr_ratio")
    if lowest is not None and recipe.schedule.name == "Cosine":
        recipe.schedule["final"] = min(1.0, lowest)
    huggingface.read_length(keys, recipe, "num_epochs", 1.0)
    huggingface.read_checkpoint(keys, recipe, None)
    huggingface.read_evaluation(keys, recipe)
    huggingface.read_precision(keys, recipe)
    recipe.training["seed"] = keys.integer("seed")
    _read_losses(keys, recipe)
    _read_tracking(keys, recipe)
    _read_extensions(keys)
    keys.finish(LOST, IDLE)


def _read_stage(keys: Keys, recipe: Recipe) -> None:
    for key in ("processor_type", "freeze_mm_modules", "image_size"):
        if keys.has(key):
            keys.refuse(key, "is for images or audio; text models alone are trained")
    rl = keys.text("rl")
    if keys.boolean("reward_model"):
        recipe.stage = "reward"
    elif keys.boolean("process_reward_model"):
        keys.refuse(
            "process_reward_model", "scores steps of an answer; reward models here score whole answers"
        )
    elif rl in ("grpo", "gdpo"):
        keys.refuse(
            "rl",
            f"{rl}: its reward functions take TRL's arguments; write them as rules in configs/quickstart_grpo",
        )
    elif rl is not None:
        if rl not in _RL:
            keys.refuse("rl", f"{rl!r} is none of {', '.join(_RL)}, which can be carried")
        recipe.stage = _RL[rl]


def _read_model(keys: Keys, recipe: Recipe) -> None:
    recipe.model["path"] = keys.text("base_model")
    if not recipe.model.fields.get("path"):
        keys.refuse("base_model", "is empty; the model's name or folder was expected")
    recipe.model["revision"] = keys.text("revision_of_model")
    config = keys.text("base_model_config")
    tokenizer = keys.text("tokenizer_config")
    for key, other in (("base_model_config", config), ("tokenizer_config", tokenizer)):
        if other and other != recipe.model.fields["path"]:
            keys.lose(key, f"config and tokenizer are the model's own, not those of {other}")
    adapter = keys.text("adapter")
    four, eight = keys.boolean("load_in_4bit"), keys.boolean("load_in_8bit")
    if adapter not in (None, "lora", "qlora"):
        keys.lose("adapter", f"{adapter}: adapters are LoRA")
    if adapter:
        recipe.adapter = lora_part(keys, recipe, _LORA, 8, 16)
        recipe.adapter["target_parameters"] = tuple(keys.texts("lora_target_parameters")) or None
        if keys.boolean("lora_target_linear"):
            recipe.adapter.fields.pop("targets", None)
        if recipe.adapter.fields.get("target_parameters") and recipe.adapter.fields.get("dropout"):
            recipe.adapter["dropout"] = 0.0
            recipe.decide("adapter.dropout", "an adapter of target_parameters has none")
    else:
        for key in (*_LORA.values(), "lora_target_linear"):
            if keys.has(key):
                keys.ignore(key, "there is no adapter")
    if four or (adapter == "qlora" and not eight):
        recipe.model["quantization"] = "nf4"
    elif eight:
        recipe.model["quantization"] = "int8"
    if recipe.model.fields.get("quantization") and recipe.adapter is None:
        del recipe.model.fields["quantization"]
        keys.lose(
            "load_in_4bit" if four else "load_in_8bit",
            "quantized weights can only train an adapter, and there is none",
        )
    checkpointing = keys.take("gradient_checkpointing")
    if not checkpointing:
        recipe.training["gradient_checkpointing"] = False
    elif checkpointing in ("offload", "offload_disk"):
        recipe.offload("gradient_checkpointing")
    elif keys.take("activation_offloading"):
        recipe.offload("activation_offloading")


def _read_rows(keys: Keys, recipe: Recipe) -> None:
    recipe.data["max_length"] = keys.integer("sequence_len", 512)
    strategy = keys.text("excess_length_strategy", "drop")
    recipe.data["too_long"] = {"truncate": "cut", "raise": "error"}.get(strategy or "", "drop")
    huggingface.read_validation_share(keys, recipe, "val_set_size")
    if keys.boolean("train_on_inputs") and recipe.stage == "sft":
        recipe.data["learn"] = "all"
    if keys.boolean("dataset_exact_deduplication"):
        recipe.data["duplicates"] = "drop"
    recipe.read_system(keys, "default_system_message")


def _read_batch(keys: Keys, recipe: Recipe, devices: int) -> None:
    rows = max(1, keys.integer("micro_batch_size", 1) or 1)
    passes = keys.integer("gradient_accumulation_steps")
    total = keys.integer("batch_size")
    if passes is None:
        passes = max(1, (total or rows) // rows)
    packing = keys.boolean("sample_packing")
    pack = (
        recipe.data["max_length"] if recipe.stage == "text" or (packing and recipe.stage == "sft") else None
    )
    shared = recipe.share_rows("context_parallel_size", keys.integer("context_parallel_size"))
    devices = max(1, devices // shared)
    words = f"micro_batch_size {rows} × gradient_accumulation_steps {passes} × {devices} device{'s' * (devices > 1)}"
    recipe.batch = Batch(rows, max(1, passes), devices, pack, words)


def _read_losses(keys: Keys, recipe: Recipe) -> None:
    beta = keys.number("rl_beta") or keys.number("dpo_beta") or 0.1
    if recipe.stage == "reward":
        recipe.training["loss"] = Part("FocalRanking", gamma=0.0, barrier=0.0)
        recipe.decide("loss", "plain Bradley-Terry, as there")
        recipe.training["reward_token"] = ...
        recipe.decide("reward_token", "the score is that of the last token, as there")
    elif recipe.stage == "kto":
        recipe.training["beta"] = beta
        recipe.training["desirable_weight"] = keys.number("kto_desirable_weight", 1.0)
        recipe.training["undesirable_weight"] = keys.number("kto_undesirable_weight", 1.0)
    elif recipe.stage == "dpo":
        rl = keys.text("rl")
        recipe.training |= {"beta": beta, "loss": "ipo" if rl == "ipo" else "sigmoid"}
        recipe.training["nll_weight"] = keys.number("rpo_alpha", 0.0)
        recipe.training["label_smoothing"] = keys.number("dpo_label_smoothing", 0.0)
        if rl in ("orpo", "simpo"):
            keys.lose("rl", f"{rl}: there is none here; this is DPO, whose beta is another: 0.1 is usual")
            recipe.training["beta"] = 0.1
        if rl == "orpo":
            recipe.training["nll_weight"] = 1.0
            recipe.decide(
                "nll_weight", "ORPO's likelihood term, beside DPO's loss in place of the odds ratio"
            )


def _read_extensions(keys: Keys) -> None:
    """Plugins and special tokens."""
    others = [name for name in keys.texts("plugins") if not re.search("Liger|CutCrossEntropy|Kernels", name)]
    if others:
        keys.lose(
            "plugins", f"{', '.join(name.rpartition('.')[2] for name in others)}: plugins have no counterpart"
        )
    elif keys.has("plugins"):
        keys.ignore("plugins", KERNELS)
    special = keys.part("special_tokens")
    if special is not None:
        if special.has("pad_token"):
            special.ignore("pad_token", "there is no padding")
        for key in ("bos_token", "eos_token", "unk_token", "additional_special_tokens"):
            if special.has(key):
                special.lose(key, "the tokenizer is the model's own: change it in the model's folder")


def _read_tracking(keys: Keys, recipe: Recipe) -> None:
    project = keys.text("wandb_project")
    patience = keys.integer("early_stopping_patience")
    if project:
        recipe.training["tracking"] = Part("Wandb", project=project, entity=keys.text("wandb_entity"))
        keys.ignore("wandb_name", "a run's name is its config's file name, or `name`")
    if patience and "split" in recipe.data and recipe.stage not in ("dpo", "kto"):
        recipe.evaluation["patience"] = patience
    elif patience:
        keys.lose("early_stopping_patience", "evaluation.patience needs validation rows, and no DPO or KTO")
