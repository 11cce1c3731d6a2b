"""Configs of LLaMA-Factory (YAML): pt, sft, rm, ppo, dpo, kto."""

from __future__ import annotations

from pathlib import Path

from tuner.errors import UserError
from tuner.importers import huggingface
from tuner.importers.keys import Block, Keys
from tuner.importers.llama_factory_data import read_datasets
from tuner.importers.llama_factory_keys import IDLE, LOST
from tuner.importers.lora import lora_part
from tuner.importers.part import Part
from tuner.importers.recipe import Batch, Recipe, Stage

_STAGES: dict[str, Stage] = {
    "pt": "text",
    "sft": "sft",
    "rm": "reward",
    "ppo": "ppo",
    "dpo": "dpo",
    "kto": "kto",
}
_TEMPLATES = {
    "alpaca": "alpaca",
    "chatml": "chatml",
    "gemma": "gemma",
    "intern2": "internlm2",
    "llama3": "llama3",
    "mistral": "mistral",
    "qwen": "qwen",
    "qwen3_nothink": "qwen",
}
"""Template -> tuner's of the same family; others are the model's own."""
_DEFAULT_SYSTEMS = ("qwen", "intern2", "alpaca")
"""Templates that add a system prompt where a row has none, which tuner's do not."""
_LORA = {
    "r": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "lora_target",
    "whole": "additional_target",
}


def read_llama_factory(block: Block, file: Path, recipe: Recipe, devices: int) -> None:
    """Fill a recipe from the keys of a LLaMA-Factory config. Raises UserError where it trains what tuner does not."""
    keys = Keys(block, recipe.report, str(file))
    if not keys.boolean("do_train", True) or (keys.has("do_predict") and not keys.has("do_train")):
        raise UserError(
            f"{file}: trains nothing (no do_train); `tuner chat` and `tuner eval` answer with a trained model"
        )
    if "stage" not in block and ("export_dir" in block or "infer_backend" in block or "dataset" not in block):
        raise UserError(
            f"{file}: trains nothing (no stage and dataset); `tuner merge` merges, and `tuner chat` answers"
        )
    stage = keys.text("stage", "sft") or "sft"
    if stage not in _STAGES:
        keys.refuse("stage", f"{stage!r} is none of {', '.join(_STAGES)}; correct it")
    recipe.stage = _STAGES[stage]
    _read_model(keys, recipe)
    _read_data(keys, file, recipe)
    _read_batch(keys, recipe, devices)
    huggingface.read_optimizer(keys, recipe, "optim", "adamw_torch", 5e-5)
    huggingface.read_schedule(keys, recipe, "lr_scheduler_type", "linear", 0.0)
    huggingface.read_length(keys, recipe, "num_train_epochs", 3.0)
    huggingface.read_checkpoint(keys, recipe, 500)
    huggingface.read_evaluation(keys, recipe)
    huggingface.read_precision(keys, recipe)
    recipe.training["seed"] = keys.integer("seed")
    _read_losses(keys, recipe)
    if "wandb" in keys.texts("report_to"):
        recipe.training["tracking"] = Part("Wandb")
    keys.finish(LOST, IDLE)


def _read_model(keys: Keys, recipe: Recipe) -> None:
    recipe.model["path"] = keys.text("model_name_or_path")
    if not recipe.model.fields.get("path"):
        keys.refuse("model_name_or_path", "is empty; the model's name or folder was expected")
    revision = keys.text("model_revision")
    recipe.model["revision"] = None if revision == "main" else revision
    if keys.boolean("resize_vocab"):
        recipe.model["resize_embeddings"] = True
    if keys.boolean("trust_remote_code"):
        keys.ignore(
            "trust_remote_code",
            "transformers has the code of most models; where not, write trust_remote_code=True",
        )
    kind = keys.text("finetuning_type", "lora")
    if kind == "lora":
        recipe.adapter = lora_part(keys, recipe, _LORA, 8, None)
    elif kind == "oft":
        keys.lose("finetuning_type", "oft: adapters are LoRA, whose learning rate and rank are its own")
        recipe.adapter = Part("LoRA", r=8, alpha=16.0)
    elif kind == "freeze":
        _read_frozen(keys, recipe)
    elif kind != "full":
        keys.refuse("finetuning_type", f"{kind!r} is none of lora, full, freeze, oft; correct it")
    bits = keys.integer("quantization_bit")
    if bits is not None:
        recipe.model["quantization"] = "int8" if bits == 8 else "nf4"
        method = keys.text("quantization_method", "bnb")
        if (
            bits not in (4, 8)
            or method not in ("bnb", "bitsandbytes")
            or keys.text("quantization_type", "nf4") != "nf4"
        ):
            recipe.decide(
                "model.quantization",
                f"it was {bits}-bit by {method}; a frozen base is NF4 or INT8 by bitsandbytes",
            )
        if recipe.adapter is None:
            recipe.adapter = Part("LoRA")
            recipe.decide("adapter", "quantized weights can only train an adapter")
    if keys.boolean("disable_gradient_checkpointing") or not keys.boolean("gradient_checkpointing", True):
        recipe.training["gradient_checkpointing"] = False
    elif keys.boolean("use_unsloth_gc"):
        recipe.offload("use_unsloth_gc")


def _read_frozen(keys: Keys, recipe: Recipe) -> None:
    """The layers that `freeze` trains: the last ones."""
    layers = keys.integer("freeze_trainable_layers", 2) or 2
    if recipe.stage in ("dpo", "kto", "ppo"):
        keys.lose(
            "finetuning_type", f"freeze: {recipe.stage.upper()} freezes nothing here; all weights are trained"
        )
    elif layers > 0:
        recipe.freeze = Part("Freeze", all_but_last_layers=layers)
        recipe.decide("freeze", "the final norm and the output head are trained, too")
    else:
        keys.lose(
            "freeze_trainable_layers",
            "the first layers alone cannot be chosen; write freeze=Freeze(names=...)",
        )


def _read_data(keys: Keys, file: Path, recipe: Recipe) -> None:
    for key in ("image_max_pixels", "video_max_pixels", "freeze_vision_tower", "audio_sampling_rate"):
        if keys.has(key):
            keys.refuse(key, "is for images, videos or audio; text models alone are trained")
    read_datasets(keys, file, recipe)
    recipe.data["max_length"] = keys.integer("cutoff_len", 2048)
    recipe.data["too_long"] = "cut"
    limit = keys.integer("max_samples")
    if limit:
        recipe.data["limit"] = limit
    huggingface.read_validation_share(keys, recipe, "val_size")
    if keys.boolean("train_on_prompt"):
        recipe.data["learn"] = "all"
    elif keys.boolean("mask_history"):
        recipe.data["learn"] = "last"
    recipe.read_system(keys, "default_system")
    template = keys.text("template")
    if template is None or recipe.stage == "text":
        return
    if template not in _TEMPLATES:
        recipe.decide(
            "data.template", f"{template}: the model's own template; `tuner data` shows what it writes"
        )
    recipe.data["template"] = _TEMPLATES.get(template, "tokenizer")
    if template in _DEFAULT_SYSTEMS and not recipe.data.get("system"):
        keys.lose(
            "template",
            f"{template} adds a system prompt to rows without one; write it as data.system for the same tokens",
        )


def _read_batch(keys: Keys, recipe: Recipe, devices: int) -> None:
    rows = max(1, keys.integer("per_device_train_batch_size", 8) or 8)
    passes = max(1, keys.integer("gradient_accumulation_steps", 1) or 1)
    if recipe.stage == "ppo":
        passes *= max(1, keys.integer("ppo_buffer_size", 1) or 1)
    packing = keys.boolean("packing", recipe.stage == "text") or keys.boolean("neat_packing")
    pack = recipe.data["max_length"] if packing and recipe.stage in ("sft", "text") else None
    if pack and recipe.stage == "sft" and not keys.boolean("neat_packing"):
        recipe.decide("data", "attention crossed the samples of a pack (no neat_packing); here it never does")
    words = f"per_device_train_batch_size {rows} × gradient_accumulation_steps {passes} × "
    recipe.batch = Batch(rows, passes, devices, pack, f"{words}{devices} device{'s' * (devices > 1)}")


def _read_losses(keys: Keys, recipe: Recipe) -> None:
    if recipe.stage == "dpo":
        _read_dpo(keys, recipe)
    elif recipe.stage == "kto":
        recipe.training["beta"] = keys.number("pref_beta", 0.1)
        recipe.training["desirable_weight"] = keys.number("kto_chosen_weight", 1.0)
        recipe.training["undesirable_weight"] = keys.number("kto_rejected_weight", 1.0)
    elif recipe.stage == "reward":
        recipe.training["loss"] = Part("FocalRanking", gamma=0.0, barrier=0.0)
        recipe.decide("loss", "plain Bradley-Terry, as there")
        recipe.training["reward_token"] = ...
        recipe.decide("reward_token", "the score is that of the last token, as there")
    elif recipe.stage == "ppo":
        _read_ppo(keys, recipe)


def _read_dpo(keys: Keys, recipe: Recipe) -> None:
    loss = keys.text("pref_loss", "sigmoid") or "sigmoid"
    recipe.training["beta"] = keys.number("pref_beta", 0.1)
    recipe.training["nll_weight"] = keys.number("pref_ftx", 0.0)
    recipe.training["label_smoothing"] = keys.number("dpo_label_smoothing", 0.0)
    recipe.training["ld_alpha"] = keys.number("ld_alpha")
    if loss == "kto_pair":
        recipe.stage = "kto"
        keys.lose(
            "pref_loss", "kto_pair: this is KTO, whose rows are preferences: the better answers are desirable"
        )
        for field in ("nll_weight", "label_smoothing", "ld_alpha"):
            recipe.training.pop(field)
    elif loss in ("orpo", "simpo"):
        keys.lose(
            "pref_loss", f"{loss}: there is none here; this is DPO, whose beta is another: 0.1 is usual"
        )
        recipe.training |= {"beta": 0.1, "loss": "sigmoid"}
        if loss == "orpo":
            recipe.training["nll_weight"] = 1.0
            recipe.decide(
                "nll_weight", "ORPO's likelihood term, beside DPO's loss in place of the odds ratio"
            )
    elif loss in ("sigmoid", "hinge", "ipo"):
        recipe.training["loss"] = loss
    else:
        keys.refuse(
            "pref_loss", f"{loss!r} is none of sigmoid, hinge, ipo, kto_pair, orpo, simpo; correct it"
        )


def _read_ppo(keys: Keys, recipe: Recipe) -> None:
    reward = keys.text("reward_model")
    if not reward:
        keys.refuse("reward_model", "is missing; a reward model was expected")
    recipe.training["reward"] = f"runs/{Path(reward).name or 'reward'}"
    keys.lose(
        "reward_model",
        f"{reward}: value heads are not read; train it here from the same rows, by an import of its config",
    )
    recipe.decide("reward", "a run of tuner's: train the reward model first, and correct the name")
    top_k = keys.integer("top_k", 50) or None
    sampling = Part("Sampling", max_new_tokens=keys.integer("max_new_tokens", 1024), top_k=top_k)
    sampling["top_p"] = keys.number("top_p", 0.7)
    sampling["temperature"] = keys.number("temperature", 0.95)
    recipe.training["sampling"] = sampling
    recipe.training["mini_batches"] = keys.integer("ppo_buffer_size", 1)
    recipe.training["update_epochs"] = keys.integer("ppo_epochs", 4)
    recipe.training["normalize_rewards"] = keys.boolean("ppo_score_norm")
    target = keys.number("ppo_target", 6.0)
    recipe.training["kl"] = Part("AdaptiveKL", target=target)
    recipe.decide("kl", "adapted to a target of the KL per answer, as there")
