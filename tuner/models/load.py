"""Loading: a model ready to be trained or used, with its tokenizer and what it is based on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tuner import config
from tuner.errors import UserError
from tuner.models.adapters import SCORE, add_adapter, continue_adapter
from tuner.models.base_record import BaseReference
from tuner.models.freeze import freeze as freeze_weights
from tuner.models.locate import Location, first_line, locate
from tuner.models.quantization import keep_unpacked, quantization_config
from tuner.models.rope import apply_rope, install_segmented_rope
from tuner.models.tokenizer import load_tokenizer, read_tokenizer
from tuner.models.unwrap import unwrapped
from tuner.models.varlen import NAME as ATTENTION
from tuner.models.varlen import register as register_attention

__all__ = ["Loaded", "load_model", "load_model_config", "load_tokenizer"]

Precision = Literal["bf16", "fp32"]
Head = Literal["language", "score"]
"""What a model ends in: logits over the vocabulary, or one scalar (reward models)."""
_LANGUAGE_HEADS = ("lm_head.weight", "lm_head.bias", "output.weight")
"""Weights of a checkpoint that a reward model leaves where they are."""


@dataclass(frozen=True)
class Loaded:
    """A model in memory and what belongs to it."""

    model: nn.Module
    """transformers' model, or peft's wrapper around it."""

    tokenizer: PreTrainedTokenizerBase
    base: BaseReference
    """What is trained on: the frozen base of an adapter, or where full training started."""

    lora: config.LoRA | None
    """Settings of the adapter; None for full weights, and for adapters made elsewhere."""

    precision: Precision
    """What frozen weights are held in, and matrix products are to be computed in."""

    @property
    def transformer(self) -> PreTrainedModel:
        """The model without peft's wrapper; adapters inside it stay active."""
        return unwrapped(self.model)


def load_model(
    model: config.Model,
    *,
    precision: Precision,
    device: torch.device,
    adapter: config.LoRA | None = None,
    freeze: config.Freeze | None = None,
    seed: int = 0,
    train: bool = True,
    head: Head = "language",
) -> Loaded:
    """Load a model to train it, or with `train=False` to use it; it comes in eval mode.

    Frozen weights are held in `precision` (or quantised), trained ones in fp32: all of them without an
    adapter, else the adapter, fresh from `seed` or the saved one continued. A scalar head is in fp32 and trained,
    the saved one or zeros. Raises UserError when the model is missing, broken, or not what the config or a saved
    adapter says, and when a language model is asked for and a reward model found.
    """
    location = locate(model, precision)
    if head == "language":
        refuse_reward_model(location, model.path)
    if train:
        check_precision(location, precision)
    reference = replace(location.reference, precision=precision)
    full = train and adapter is None and location.adapter_folder is None and reference.quantization is None
    held_in = torch.float32 if full or precision == "fp32" else torch.bfloat16
    transformer = load_base(
        location,
        held_in,
        compute_dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        device=device,
        trust_remote_code=model.trust_remote_code,
        head=head,
    )
    transformer.requires_grad_(full)
    wrapped, lora = _with_adapter(transformer, location, adapter, seed, train)
    if train:
        freeze_weights(wrapped, freeze)
    if full and precision == "bf16":
        _hold_frozen_in_bf16(wrapped)
    tokenizer = read_tokenizer(location.tokenizer_folder, trust_remote_code=model.trust_remote_code)
    return Loaded(wrapped.eval(), tokenizer, reference, lora, precision)


def check_precision(location: Location, precision: Precision) -> None:
    """UserError where an adapter on 4-bit or 8-bit codes is to be held in another precision than it was trained in.

    Codes are of weights rounded to the precision first: another gives another base.
    """
    had = location.reference.precision
    if (
        location.adapter_folder is not None
        and location.reference.quantization is not None
        and had != precision
    ):
        raise UserError(
            f"precision={precision!r}: the adapter in {location.adapter_folder} was trained on a base held in {had}; "
            f"write precision={had}, or `tuner merge` the run first"
        )


def refuse_reward_model(location: Location, path: str) -> None:
    """UserError for a model that ends in a scalar head where one is to talk."""
    if location.has_score:
        raise UserError(
            f"{path}: this is a reward model, and a language model is needed; name that, or its run"
        )


def load_model_config(model: config.Model) -> PreTrainedConfig:
    """transformers' configuration of a model with its rope applied: shape and lengths, without weights."""
    location = locate(model, weights=False)
    values = _read_config(location.base_folder, model.trust_remote_code)
    apply_rope(location.reference.rope, values)
    return values


def load_base(
    location: Location,
    held_in: torch.dtype,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    head: Head = "language",
) -> PreTrainedModel:
    """The base of a location, without its adapter.

    held_in: dtype of unquantised weights; compute_dtype: of the products of 4-bit layers. A scalar head that the
    base does not have is zero.
    """
    register_attention()
    folder, reference = location.base_folder, location.reference
    values = _read_config(folder, trust_remote_code)
    apply_rope(reference.rope, values)
    options: dict[str, Any] = {}
    scores = head == "score"
    if scores:
        values.num_labels, values.problem_type = 1, "regression"  # vLLM takes it for: no sigmoid on the score
    if reference.quantization is not None:
        options["quantization_config"] = quantization_config(
            reference.quantization, compute_dtype, [SCORE] if scores else None
        )
    if reference.quantization is not None or device.type != "cpu":
        options["device_map"] = {"": device}
    try:
        with _quiet_without_terminal():
            kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
            transformer, report = kind.from_pretrained(
                str(folder),
                config=values,
                dtype=held_in,
                attn_implementation=ATTENTION,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # else they are a table in the log: _check_report says them
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded ({first_line(error)}); restore the folder") from error
    if scores:
        _settle_score(transformer, report, folder, saved=location.base_has_score)
    _check_report(report, folder)
    keep_unpacked(transformer)
    install_segmented_rope(transformer)
    return transformer


def _read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # config.json is the user's: whatever it makes a library raise is about the file
        hint = (
            "" if trust_remote_code else ", or set model.trust_remote_code=true if it needs code of its own"
        )
        raise UserError(
            f"{folder}/config.json: cannot be read ({first_line(error)}); restore it{hint}"
        ) from error


def _with_adapter(
    transformer: PreTrainedModel, location: Location, asked: config.LoRA | None, seed: int, train: bool
) -> tuple[nn.Module, config.LoRA | None]:
    if location.adapter_folder is not None:
        saved = location.lora
        wrapped = continue_adapter(
            transformer, location.adapter_folder, asked=asked, saved=saved, trained=train
        )
        return wrapped, asked or saved
    if asked is not None:
        return add_adapter(transformer, asked, seed), asked
    return transformer, None


def _hold_frozen_in_bf16(model: nn.Module) -> None:
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()


def _settle_score(transformer: PreTrainedModel, report: dict[str, Any], folder: Path, *, saved: bool) -> None:
    """The scalar head in fp32: as it was saved, or zeros on a language model, whose own head is no longer asked for.

    From zeros every answer begins with the same score, and nothing depends on a draw.
    """
    score = getattr(transformer, SCORE, None)
    if not isinstance(score, torch.nn.Linear) or score.out_features != 1:
        raise UserError(
            f"{folder}: {type(transformer).__name__} has no scalar head named {SCORE!r}, so it cannot be a reward model"
        )
    if not saved:  # what is missing of a reward model's stays in the report, to be refused
        torch.nn.init.zeros_(score.weight)
        vars(transformer).pop("_weight_conversions", None)  # those met while loading, so without the head's
        report["missing_keys"] = set(report["missing_keys"]) - {f"{SCORE}.weight"}
    score.float()
    report["unexpected_keys"] = set(report["unexpected_keys"]) - set(_LANGUAGE_HEADS)


def _check_report(report: dict[str, Any], folder: Path) -> None:
    """transformers leaves missing weights at random with a mere warning."""
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[f"{kind}_keys"])
        if names:
            raise UserError(
                f"{folder}: {len(names)} {kind} weights, such as {', '.join(names[:3])}; "
                "its weights and its config.json do not belong together: restore the folder"
            )
    if report["error_msgs"]:
        raise UserError(f"{folder}: cannot be loaded ({report['error_msgs'][0]}); restore the folder")


@contextmanager
def _quiet_without_terminal() -> Iterator[None]:
    """No progress bar in log files, and no table of mismatches: those become one sentence."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
