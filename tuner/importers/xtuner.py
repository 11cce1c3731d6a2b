"""Configs of XTuner 0.2 (mmengine's Python files, read as syntax)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuner.errors import UserError
from tuner.importers.keys import Block, Keys
from tuner.importers.lora import lora_part
from tuner.importers.part import Part
from tuner.importers.python_values import Symbol
from tuner.importers.recipe import Batch, Recipe, Stage
from tuner.importers.xtuner_data import read_datasets, same_in_all, template_name, type_name
from tuner.importers.xtuner_keys import IDLE, LOST, TOP
from tuner.importers.xtuner_run import read_runtime, read_schedule
from tuner.importers.xtuner_templates import COUNTERPARTS, DIFFERENT, MARKERS, jinja_template

_STAGES: dict[str, Stage] = {
    "SupervisedFinetune": "sft",
    "DPO": "dpo",
    "ORPO": "dpo",
    "RewardModel": "reward",
}
_DPO_LOSSES = ("sigmoid", "hinge", "ipo", "robust")
_REWARD_TOKENS = {92527: "[UNUSED_TOKEN_130]", 128002: "<|reserved_special_token_0|>"}
"""Ids of the reward tokens in XTuner's configs (InternLM2, Llama 3) -> the tokens."""


def read_xtuner(names: Block, unused: list[str], file: Path, recipe: Recipe, devices: int) -> None:
    """Fill a recipe from the names of an XTuner config. Raises UserError where it trains what tuner does not."""
    top = Keys(Block({key: names[key] for key in TOP if key in names}, names.lines), recipe.report, str(file))
    if "training_args" in names:
        top.refuse(
            "training_args",
            "is for the trainer of transformers; import the config of the same name without _hf",
        )
    model = top.part("model")
    if model is None:
        raise UserError(
            f"{file}: `model` is missing or computed by code; it must be a dict of literals and names"
        )
    name = type_name(model)
    if name not in _STAGES:
        model.refuse(
            "type", f"{name or 'it'} is none of {', '.join(_STAGES)}; text models alone can be carried"
        )
    recipe.stage = _STAGES[name]
    _read_model(model, recipe)
    _read_tokenizer(top, recipe)
    accumulation = _read_optimizer(top, recipe)
    width = names.get("sequence_parallel_size")
    shared = recipe.share_rows("sequence_parallel_size", width if isinstance(width, int) else None)
    replicas = max(1, devices // shared)
    words = f"{replicas} device{'s' * (replicas > 1)}" + (
        f" (groups of {shared} shared a sequence)" if shared > 1 else ""
    )
    _read_data(top, recipe, (accumulation, replicas), words)
    _read_loss(model, name, recipe)
    read_schedule(top, recipe, accumulation)
    read_runtime(top, recipe, accumulation)
    for key in unused:
        if key not in TOP:
            recipe.report.ignore(key, "the file defines it, and nothing reads it")
    top.finish(LOST, IDLE)


def _read_model(model: Keys, recipe: Recipe) -> None:
    llm = model.part("llm")
    if llm is None:
        model.refuse("llm", "is missing; a model was expected")
    if type_name(llm) != "from_pretrained":
        llm.lose("type", "models are loaded by AutoModelForCausalLM.from_pretrained")
    path = llm.text("pretrained_model_name_or_path")
    if not path or isinstance(path, Symbol):
        llm.refuse(
            "pretrained_model_name_or_path",
            "is missing or computed by code; write the model's name or folder",
        )
    recipe.model["path"] = path
    recipe.model["revision"] = llm.text("revision")
    if llm.boolean("trust_remote_code"):
        llm.ignore(
            "trust_remote_code",
            "transformers has the code of most models; where not, write trust_remote_code=True",
        )
    if llm.boolean("load_in_8bit"):
        recipe.model["quantization"] = "int8"
    quantization = llm.part("quantization_config")
    if quantization is not None:
        type_name(quantization)
        if quantization.boolean("load_in_4bit"):
            if quantization.text("bnb_4bit_quant_type", "nf4") != "nf4":
                recipe.decide(
                    "model.quantization", "it was fp4; NF4 takes as much memory and is closer to the weights"
                )
            recipe.model["quantization"] = "nf4"
        elif quantization.boolean("load_in_8bit"):
            recipe.model["quantization"] = "int8"
    lora = model.part("lora")
    if lora is not None:
        type_name(lora)
        recipe.adapter = lora_part(
            lora, recipe, {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}, 8, 8
        )
    elif "quantization" in recipe.model.fields:
        recipe.adapter = Part("LoRA")
        recipe.decide("adapter", "quantized weights can only train an adapter")
    if not model.boolean("use_activation_checkpointing", True):
        recipe.training["gradient_checkpointing"] = False
    reference = model.part("ref_llm")
    if reference is not None:
        model.lose("ref_llm", "the reference of DPO is the model as it starts")


def _read_tokenizer(top: Keys, recipe: Recipe) -> None:
    tokenizer = top.part("tokenizer")
    if tokenizer is None:
        return
    type_name(tokenizer)
    path = tokenizer.text("pretrained_model_name_or_path")
    if path and path != recipe.model.fields["path"]:
        tokenizer.lose(
            "pretrained_model_name_or_path", f"the tokenizer is the model's own, not that of {path}"
        )
    if tokenizer.boolean("trust_remote_code"):
        tokenizer.ignore("trust_remote_code", "see model.llm.trust_remote_code")


def _read_optimizer(top: Keys, recipe: Recipe) -> int:
    """Fills the optimizer; returns the number of passes per optimizer step."""
    wrapper = top.part("optim_wrapper")
    if wrapper is None:
        return 1
    type_name(wrapper)
    optimizer = wrapper.part("optimizer")
    if optimizer is not None:
        name = type_name(optimizer)
        if name not in ("AdamW", "PagedAdamW32bit", "PagedAdamW8bit", "AdamW8bit"):
            optimizer.lose("type", f"{name}: the optimizer is AdamW")
        if "8bit" in name:
            recipe.optimizer["bits"] = 8
        if "Paged" in name:
            recipe.optimizer["paged"] = True
        for field, key in (("lr", "lr"), ("weight_decay", "weight_decay"), ("eps", "eps")):
            recipe.optimizer[field] = optimizer.number(key)
        betas = optimizer.take("betas")
        if isinstance(betas, list | tuple) and len(betas) == 2:
            recipe.optimizer["betas"] = tuple(float(beta) for beta in betas)
    clip = wrapper.part("clip_grad")
    norm = None if clip is None else clip.number("max_norm")
    recipe.training["max_grad_norm"] = norm or ...
    return max(1, wrapper.integer("accumulative_counts", 1) or 1)


def _read_data(top: Keys, recipe: Recipe, times: tuple[int, int], devices: str) -> None:
    """Fills data and batch. times: passes per step, and devices of different rows, which `devices` puts in words."""
    loader = top.part("train_dataloader")
    dataset = None if loader is None else loader.part("dataset")
    if loader is None or dataset is None:
        raise UserError(
            f"{top.where('train_dataloader')}: train_dataloader.dataset is missing or computed by code"
        )
    blocks = read_datasets(dataset, recipe)
    length = same_in_all(blocks, "max_length") or recipe.data.get("max_length")
    if not isinstance(length, int) or length < 4:
        blocks[0].refuse("max_length", "is missing or computed by code; write a number of tokens")
    packed = bool(same_in_all(blocks, "pack_to_max_length")) or any(
        block.has("max_packed_length") for block in blocks
    )
    pack = (
        same_in_all(blocks, "max_packed_length")
        if recipe.stage in ("dpo", "reward")
        else length
        if packed
        else None
    )
    if recipe.stage in ("dpo", "reward") and not same_in_all(blocks, "use_varlen_attn"):
        pack = None
    rows = max(1, loader.integer("batch_size", 1) or 1)
    words = f"batch_size {rows} × accumulative_counts {times[0]} × {devices}"
    recipe.batch = Batch(rows, *times, pack if isinstance(pack, int) else None, words)
    recipe.data["max_length"] = length
    recipe.data["too_long"] = "cut"
    if recipe.stage in ("dpo", "reward"):
        for block in blocks:
            for key in ("is_dpo", "is_reward", "reward_token_id"):
                block.take(key)
        compares = bool(same_in_all(blocks, "is_reference"))
        # XTuner renders preferences by the tokenizer's template, but for POLAR
        recipe.data["template"] = "polar" if compares else "tokenizer"
        if compares:
            recipe.data["too_long"] = "drop"
            recipe.decide(
                "data.too_long", "POLAR's prompts were cut; here its rows are dropped that are too long"
            )
    else:
        _read_template(blocks, recipe)
    if recipe.stage == "reward":
        _read_reward_token(blocks, recipe)
    if packed and recipe.stage == "sft" and not same_in_all(blocks, "use_varlen_attn"):
        recipe.decide("data", "attention crossed the samples of a pack; here it never does")


def _read_template(blocks: list[Keys], recipe: Recipe) -> None:
    values: list[Any] = []
    for block in blocks:
        function = block.part("template_map_fn") if isinstance(block.take("template_map_fn"), Block) else None
        if function is not None:
            type_name(function)
            values.append(function.take("template"))
    if not values:
        return
    if any(value != values[0] for value in values):
        blocks[0].refuse("template_map_fn", "the datasets have different templates; write a config for each")
    value, name = values[0], template_name(values[0])
    if name in COUNTERPARTS:
        recipe.data["template"] = COUNTERPARTS[name]
        if name in DIFFERENT:
            recipe.decide("data.template", f"PROMPT_TEMPLATE.{name}: {DIFFERENT[name]}")
        return
    markers = value if isinstance(value, Block) else MARKERS.get(name)
    text = None if markers is None else jinja_template(name or "of this config", markers)
    if text is None:
        recipe.data["template"] = "tokenizer"
        recipe.decide(
            "data.template",
            f"PROMPT_TEMPLATE.{name or '...'} has no counterpart: this is the model's own template",
        )
        return
    file = f"xtuner_{name or 'template'}.jinja"
    recipe.templates[file] = text
    recipe.data["template"] = file
    recipe.decide(
        "data.template", f"the markers of PROMPT_TEMPLATE.{name or '...'}, written beside this config"
    )


def _read_reward_token(blocks: list[Keys], recipe: Recipe) -> None:
    token = same_in_all(blocks, "reward_token_id")
    if token in _REWARD_TOKENS:
        recipe.training["reward_token"] = _REWARD_TOKENS[token]
        recipe.decide("reward_token", f"token {token} of this family")
    else:
        blocks[0].lose(
            "reward_token_id",
            f"{token}: write the token itself as reward_token, which must be in the vocabulary",
        )
        recipe.training["reward_token"] = Ellipsis


def _read_loss(model: Keys, name: str, recipe: Recipe) -> None:
    if name == "ORPO":
        model.lose(
            "type",
            "there is no ORPO: this is DPO with the likelihood of the better answer added (nll_weight)",
        )
        model.lose(
            "beta",
            f"{model.number('beta', 0.1):g} was ORPO's weight of the odds ratio, which DPO's beta is not",
        )
        recipe.training["nll_weight"] = 1.0
        recipe.decide("nll_weight", "ORPO's likelihood term, beside DPO's loss in place of the odds ratio")
    elif name == "DPO":
        loss = model.text("loss_type", "sigmoid") or "sigmoid"
        if loss not in _DPO_LOSSES:
            model.lose(
                "loss_type", f"{loss}: one of {', '.join(_DPO_LOSSES)} can be carried; this is sigmoid"
            )
            loss = "sigmoid"
        recipe.training |= {"loss": loss, "beta": model.number("beta", 0.1)}
        recipe.training["label_smoothing"] = model.number("label_smoothing", 0.0)
    elif name == "RewardModel":
        penalties = {"log_barrier": "log", "L2": "square", "none": "log"}
        loss, penalty = model.text("loss_type", "ranking"), model.text("penalty_type", "log_barrier")
        if loss not in ("focal", "ranking") or penalty not in penalties:
            model.refuse(
                "loss_type",
                f"{loss} with penalty_type {penalty} is no loss of XTuner's reward models; correct it",
            )
        weight = 0.0 if penalty == "none" else 2 * (model.number("penalty_weight", 0.01) or 0.0)
        gamma = 2.0 if loss == "focal" else 0.0
        recipe.training["loss"] = Part(
            "FocalRanking", gamma=gamma, penalty=penalties[penalty], barrier=weight
        )
        if weight:
            recipe.decide(
                "loss.barrier",
                "twice XTuner's penalty_weight: it adds the penalties of both answers, here is their mean",
            )
