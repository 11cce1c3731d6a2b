"""Kinds of adapters, from their class in the config to peft's settings: which modules get one, and which are refused.

A kind is a class in config/adapter.py and an entry of `KINDS` here.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuner import config
from tuner.errors import UserError
from tuner.models.quantization import bitsandbytes

LINEAR = (nn.Linear, Conv1D)
"""Linear layers; GPT-2's hold the transposed weight."""
SCORE = "score"
"""Name of the scalar head in transformers' sequence classification models."""
SEQUENCE_CLASSIFICATION = "SEQ_CLS"
"""peft's task type of models with a scalar head: the adapter's folder then holds the head too."""


def peft_library() -> Any:
    """The module `peft`, imported without its messages."""
    bitsandbytes()  # peft imports it too, and its log messages would be seen
    import peft

    return peft


def lora_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of a model's linear layers with LoRA, whole or in 4 bit."""
    lora = peft_library().tuners.lora
    kinds = (lora.Linear, lora.bnb.Linear4bit)
    for name, module in model.named_modules():
        if type(module) in kinds:
            yield name, module


def has_score(model: nn.Module) -> bool:
    """Whether a model without peft's wrapper ends in a scalar head, as reward models do, instead of logits."""
    return isinstance(getattr(model, SCORE, None), nn.Module)


def peft_config(adapter: config.Adapter, model: PreTrainedModel) -> Any:
    """peft's settings for an adapter of this model, by the adapter's kind.

    Raises UserError when a target or a module of `train_whole` is not in the model.
    """
    return KINDS[type(adapter)].settings(adapter, model)


@dataclass(frozen=True)
class Kind:
    """A kind of adapter, between its class in tuner.config and peft's settings."""

    name: str
    """Name in messages."""
    weight_prefix: str
    """Prefix of the names of peft's modules."""
    settings: Callable[[Any, PreTrainedModel], Any]
    """From the config and the model to peft's settings."""
    saved_values: Callable[[Any], dict[str, Any]]
    """From peft's settings back to those fields of the config that a continued adapter must agree in."""
    tuner_values: tuple[str, ...]
    """Further such fields, which only tuner's own record of a saved adapter has."""
    take_dropout: Callable[[Any, Any], None]
    """Write the config's dropout into peft's settings."""


def kind_of(settings: Any, folder: Path) -> Kind:
    """The kind of a saved adapter, by peft's settings. Raises UserError for one that tuner does not train."""
    for kind in KINDS.values():
        if settings.peft_type == kind.name.upper():
            return kind
    names = ", ".join(kind.name for kind in KINDS.values())
    raise UserError(
        f"{folder}: a {settings.peft_type} adapter; only {names} adapters can be continued or merged"
    )


def _lora_settings(lora: config.LoRA, model: PreTrainedModel) -> Any:
    """Low-rank adapters (Hu et al., 2021): A is Kaiming-uniform, B is zero."""
    targets = _targets(model, lora)
    _check_names(model, lora.train_whole, "adapter.train_whole")
    _check_parameters(model, lora.target_parameters)
    return peft_library().LoraConfig(
        task_type=SEQUENCE_CLASSIFICATION if has_score(model) else "CAUSAL_LM",
        r=lora.r,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        target_parameters=list(lora.target_parameters) or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for _, layer in modules_named(model, tuple(targets))),
        modules_to_save=[*lora.train_whole, *_score_of(model)] or None,
        bias="none",
    )


def _lora_saved_values(settings: Any) -> dict[str, Any]:
    return {"r": settings.r, "alpha": float(settings.lora_alpha)}


def _lora_take_dropout(settings: Any, lora: config.LoRA) -> None:
    settings.lora_dropout = lora.dropout


KINDS: dict[type, Kind] = {
    config.LoRA: Kind(
        name="LoRA",
        weight_prefix="lora_",
        settings=_lora_settings,
        saved_values=_lora_saved_values,
        tuner_values=("targets", "target_parameters", "train_whole"),
        take_dropout=_lora_take_dropout,
    )
}
"""Every kind of adapter, by its class in tuner.config."""


def _targets(model: PreTrainedModel, adapter: config.LoRA) -> list[str]:
    """Name endings of the layers that get an adapter."""
    if adapter.targets != "all-linear":
        _check_names(model, adapter.targets, "adapter.targets")
        return list(adapter.targets)
    # the head gets no adapter, as under peft's own "all-linear"
    head = model.get_output_embeddings()
    whole = {name for name, _ in modules_named(model, (*adapter.train_whole, *_score_of(model)))}
    names = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, LINEAR) and module is not head and name not in whole
        }
    )
    targets = [name for name in names if not _means_experts(model, name)]
    if not targets and not adapter.target_parameters:
        raise UserError(
            f'adapter.targets="all-linear": {type(model).__name__} has no linear layer that an adapter fits; train '
            "without an adapter, or name modules"
        )
    return targets


def _means_experts(model: PreTrainedModel, name: str) -> bool:
    """Whether peft takes a target for experts that transformers 5 has fused, whichever layers are called so.

    In a mixture with dense layers beside its experts, "gate_proj" would silently adapt every expert and no dense layer.
    """
    settings = peft_library().LoraConfig(target_modules=[name])
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    try:
        convert_peft_config_for_transformers(settings, model, None)
    except ValueError:  # of gate and up projection, which are one parameter now, one alone
        return True
    return name not in settings.target_modules


def _check_parameters(model: nn.Module, suffixes: tuple[str, ...]) -> None:
    weights = dict(model.named_parameters())
    for suffix in suffixes:
        names = [name for name in weights if name.endswith(f".{suffix}")]
        if not names:
            fused = {short_name(name) for name, weight in weights.items() if weight.ndim == 3}
            there = f"it has {', '.join(sorted(fused))}" if fused else "it has no fused experts"
            raise UserError(
                f"adapter.target_parameters: no parameter of the model is named {suffix!r}; {there}"
            )
        owner = names[0].rpartition(".")[0]
        if isinstance(model.get_submodule(owner), (*LINEAR, nn.Embedding)):
            raise UserError(
                f"adapter.target_parameters: {suffix!r} belongs to a layer; write "
                f"{owner.rpartition('.')[2]!r} into adapter.targets or adapter.train_whole"
            )


def short_name(parameter: str) -> str:
    """A parameter's name without the model, its layer's number, and `weight`: "mlp.experts.down_proj"."""
    return re.sub(r"^.*\.\d+\.|^model\.", "", parameter).removesuffix(".weight")


def _check_names(model: nn.Module, names: tuple[str, ...], where: str) -> None:
    for name in names:
        if not any(True for _ in modules_named(model, (name,))):
            layers = {
                path.rpartition(".")[2] for path, module in model.named_modules() if hasattr(module, "weight")
            }
            raise UserError(
                f"{where}: no module of the model is named {name!r}; it has {', '.join(sorted(layers))}"
            )


def modules_named(model: nn.Module, endings: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of those whose name, or its last parts, are one of the endings."""
    for name, module in model.named_modules():
        if any(name == ending or name.endswith(f".{ending}") for ending in endings):
            yield name, module


def _score_of(model: nn.Module) -> tuple[str, ...]:
    return (SCORE,) if has_score(model) else ()


def add_score_to(settings: Any, folder: Path) -> None:
    """Turn the settings of a language model's adapter into a reward model's, whose head is trained whole."""
    whole = list(settings.modules_to_save or ())
    if "lm_head" in {*whole, *settings.target_modules}:
        raise UserError(
            f"{folder}: its adapter comes with a language head of its own, which a reward model has no place for; "
            "`tuner merge` the run first and train from the merged folder"
        )
    settings.task_type, settings.modules_to_save = SEQUENCE_CLASSIFICATION, [*whole, SCORE]
