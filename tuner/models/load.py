"""Loading: a model ready to be trained or used, with its tokenizer and the record of its base.

On the meta device the same model is built by the same code without reading weights: `tuner check` loads so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tuner import config
from tuner.errors import UserError
from tuner.models.adapter_kinds import SCORE
from tuner.models.adapters import add_adapter, continue_adapter
from tuner.models.arithmetic import Precision, hold_in, precision_notes
from tuner.models.base_record import BaseReference
from tuner.models.coverage import expert_notes
from tuner.models.device_errors import is_of_device
from tuner.models.dropout import switch_off_attention_dropout
from tuner.models.folder_files import first_line, read_file
from tuner.models.freeze import freeze as freeze_weights
from tuner.models.from_files import QUANTIZED, from_config, from_weights
from tuner.models.library_output import without_library_output
from tuner.models.locate import Location, locate, stored_quantization
from tuner.models.model_file import GenerationFile, read_transformers_config
from tuner.models.quantization import compute_in, keep_unpacked, quantization_config
from tuner.models.rope import apply_rope
from tuner.models.segment_rope import install_segmented_rope
from tuner.models.tokenizer import load_tokenizer, read_tokenizer
from tuner.models.unwrap import unwrapped
from tuner.models.varlen import NAME as ATTENTION
from tuner.models.varlen import check_attention, fallback_note, head_sizes
from tuner.models.varlen import register as register_attention
from tuner.models.vocabulary import check_vocabulary, grow_embeddings, vocabulary_size

if TYPE_CHECKING:  # models in one process do not load it
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Loaded", "Precision", "load_model", "load_tokenizer"]

Head = Literal["language", "score"]
"""The head of a model: logits over the vocabulary, or one scalar (reward models)."""
_LANGUAGE_HEADS = ("lm_head.weight", "lm_head.bias", "output.weight")
"""Weights of a checkpoint that a reward model does not load."""


@dataclass(frozen=True)
class Loaded:
    """A model in memory, its tokenizer, and the record of what it was loaded from."""

    model: nn.Module
    """transformers' model, or peft's wrapper around it."""

    tokenizer: PreTrainedTokenizerBase
    base: BaseReference
    """The frozen base of an adapter, or the model that full training starts from. Its quantization is recorded on the
    meta device, too, where it is not applied."""

    adapter: config.Adapter | None
    """Settings of the adapter; None for full weights, and for adapters that tuner did not write."""

    precision: Precision
    """Precision of frozen weights and of matrix products."""

    notes: tuple[str, ...] = ()
    """What training it changes or leaves out that its reader may not expect, a sentence each."""

    @property
    def transformer(self) -> PreTrainedModel:
        """The model without peft's wrapper; adapters inside it stay active."""
        return unwrapped(self.model)


def load_model(
    model: config.Model,
    *,
    precision: Precision,
    device: torch.device,
    adapter: config.Adapter | None = None,
    freeze: config.Freeze | None = None,
    seed: int = 0,
    train: bool = True,
    head: Head = "language",
    processes: DeviceMesh | None = None,
) -> Loaded:
    """Load a model to train it, or with `train=False` to use it; returned in eval mode.

    Frozen weights are held in `precision` (or quantized), trained ones in fp32: all weights without an adapter, else
    the adapter's, fresh from `seed` or the saved ones. A scalar head is in fp32 and trained, the saved one or zeros.
    processes: those that hold weights together, of which each reads its rows; weights that are all trained are then in
    shards at once, others when `sharding.shard` has put them there: before it no pass can be made.
    On the meta device no weights are read, or fetched from the hub. Raises UserError when the model is missing or
    broken, differs from what the config or a saved adapter says, or is a reward model where head="language".
    """
    location, tokenizer, whole = _located(model, precision, device, adapter, head, train)
    full = whole and location.reference.quantization is None
    reference = replace(location.reference, precision=precision)
    compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    # rows cannot be added to trained shards, and frozen weights among them are rounded whole
    if full and (freeze is not None or reference.embedding_rows is not None):
        processes = None
    with built_on(device):
        transformer = load_base(
            location,
            torch.float32 if full else compute_dtype,
            compute_dtype=compute_dtype,
            device=device,
            trust_remote_code=model.trust_remote_code,
            head=head,
            processes=processes,
            trained=full,
        )
        new_tokens = grow_embeddings(transformer, reference.embedding_rows, tokenizer)
        check_vocabulary(transformer, vocabulary_size(tokenizer), model.path)
        transformer.requires_grad_(full)
        notes = _prepare_training(transformer, device, precision) if train else []
        wrapped, settings = _with_adapter(transformer, location, adapter, seed, train, new_tokens)
    if train:
        freeze_weights(wrapped, freeze)
        notes += expert_notes(wrapped, reference.quantization)
    hold_in(precision, wrapped, device, full)
    return Loaded(wrapped.eval(), tokenizer, reference, settings, precision, tuple(notes))


def _located(
    model: config.Model,
    precision: Precision,
    device: torch.device,
    adapter: config.Adapter | None,
    head: Head,
    train: bool,
) -> tuple[Location, PreTrainedTokenizerBase, bool]:
    """Where a model is, its tokenizer, and whether its own weights are trained. UserError where it does not fit."""
    location = locate(model, precision, weights=device.type != "meta")
    whole = train and adapter is None and location.adapter_folder is None
    if head == "language":
        refuse_reward_model(location, model.path)
    if train:
        _check_trainable(location, precision, whole, model.path)
    tokenizer = _read_tokenizer(location, model.trust_remote_code)
    if model.resize_embeddings and location.reference.embedding_rows is None:
        location = location.with_reference(embedding_rows=vocabulary_size(tokenizer))
    return location, tokenizer, whole


def _read_tokenizer(location: Location, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    # before it the configuration, which a tokenizer reads as well, with a warning of what is wrong there
    _config_of(location, trust_remote_code)
    return read_tokenizer(location.tokenizer_folder, trust_remote_code=trust_remote_code)


def built_on(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which new weights are created on the meta device where `device` is it; else libraries place them."""
    return device if device.type == "meta" else nullcontext()


def check_precision(location: Location, precision: Precision) -> None:
    """UserError where the base of an adapter is quantized and the precision is not that of the adapter's training.

    Weights are rounded to the precision before they are quantized, so another precision gives another base.
    """
    trained_in = location.reference.precision
    if (
        location.adapter_folder is not None
        and location.reference.quantization is not None
        and trained_in != precision
    ):
        raise UserError(
            f"precision={precision!r}: the adapter in {location.adapter_folder} was trained on a base held in "
            f"{trained_in}; write precision={trained_in}, or `tuner merge` the run first"
        )


def refuse_reward_model(location: Location, path: str) -> None:
    """UserError for a model with a scalar head where a language model is needed."""
    if location.has_score:
        raise UserError(
            f"{path}: this is a reward model, and a language model is needed; name that, or its run"
        )


def load_base(
    location: Location,
    held_in: torch.dtype,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    head: Head = "language",
    processes: DeviceMesh | None = None,
    trained: bool = False,
) -> PreTrainedModel:
    """The base of a location, without its adapter, with the rows that its embedding has in its file.

    held_in: dtype of weights that are not quantized; compute_dtype: of the products of 4-bit layers. A scalar head
    that the base does not have is zero. processes: those that hold the weights together from the start; trained:
    whether all weights are (`from_files.py`). On the meta device the model is built from its config.json alone, without
    quantization.
    """
    register_attention()
    folder = location.base_folder
    values = _config_of(location, trust_remote_code)
    scores = head == "score"
    # before the weights, and before training: the model's last save would refuse it
    generation_config = None if scores else _read_generation_config(folder)
    if scores:
        # regression: vLLM then applies no sigmoid to the score
        values.num_labels, values.problem_type = 1, "regression"
    auto_class = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    options = {"dtype": held_in, "attn_implementation": ATTENTION, "trust_remote_code": trust_remote_code}
    with _blaming(folder), without_library_output():
        if device.type == "meta":
            transformer, report = from_config(auto_class, values, options)
        else:
            options |= _device_options(location, device, compute_dtype, head)
            if not _read_in_parts(location.reference.quantization, options):
                processes = None
            transformer, report = from_weights(
                auto_class, values, folder, options, processes, trained=trained
            )
    if generation_config is not None:
        transformer.generation_config = generation_config
    if scores:
        _prepare_score(transformer, report, folder, saved=location.base_has_score)
    _check_report(report, folder)
    check_attention(transformer, folder)
    _prepare_layers(transformer, compute_dtype)
    return transformer


@contextmanager
def _blaming(folder: Path) -> Iterator[None]:
    """UserError that the folder is broken, whatever a library raises, but for the device: the files are the user's."""
    try:
        yield
    except Exception as error:
        if is_of_device(error):
            raise
        raise UserError(f"{folder}: cannot be loaded ({first_line(error)}); restore the folder") from error


def _read_in_parts(quantization: str | None, options: dict[str, Any]) -> bool:
    """Whether processes can each read a part: not of 8-bit layers (`refuse_shards`), nor of 4-bit ones as stored, whose
    bytes come with their scales."""
    return quantization is None or (quantization == "nf4" and QUANTIZED in options)


def _prepare_layers(transformer: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Make 4-bit layers and rotary positions compute as training and packed rows need them, in place."""
    keep_unpacked(transformer)
    compute_in(transformer, compute_dtype)
    install_segmented_rope(transformer)


def _check_trainable(location: Location, precision: Precision, whole: bool, where: str) -> None:
    """UserError for an adapter of another precision, and for weights that are to be trained whole, but are quantized in
    their file: they have no gradients."""
    check_precision(location, precision)
    if whole and (stored := stored_quantization(location.base_folder)):
        raise UserError(
            f"{where}: its weights are in {stored}, which only an adapter can train; add adapter=LoRA(), or name the "
            "model that is not quantized"
        )


def _prepare_training(transformer: PreTrainedModel, device: torch.device, precision: Precision) -> list[str]:
    """Change what a model brings that its training cannot have, in place.

    Returns a sentence on each change, and on a device that computes slower, or in another precision, than it should.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    notes = fallback_note(capability, precision, head_sizes(transformer)) + precision_notes(device, precision)
    if dropout := switch_off_attention_dropout(transformer):
        notes += [
            f"attention dropout ({dropout:g} in config.json) is off: attention over packed rows has none"
        ]
    return notes


def _device_options(
    location: Location, device: torch.device, compute_dtype: torch.dtype, head: Head
) -> dict[str, Any]:
    """Options of `from_pretrained` by which weights are quantized and placed."""
    options: dict[str, Any] = {}
    quantization = location.reference.quantization
    if quantization is not None and stored_quantization(location.base_folder) is None:
        # transformers spares the language head by itself, but would quantize a scalar one
        whole = [SCORE] if head == "score" else None
        options["quantization_config"] = quantization_config(quantization, compute_dtype, whole)
    if quantization is not None or device.type != "cpu":
        options["device_map"] = {"": device}
    return options


def read_model_config(model: config.Model) -> PreTrainedConfig:
    """The configuration of a model as it is trained, its rope settings applied; reads no weights."""
    return _config_of(locate(model, weights=False), model.trust_remote_code)


def _config_of(location: Location, trust_remote_code: bool) -> PreTrainedConfig:
    values = read_transformers_config(location.base_folder, trust_remote_code)
    apply_rope(location.reference.rope, values)
    return values


def _read_generation_config(folder: Path) -> GenerationConfig | None:
    """The folder's generation settings, such that they can be saved again; None where it has none.

    Older files set temperature or top_p without do_sample, which transformers reads, but refuses to write: they mean
    sampling.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    read_file(file, GenerationFile, "correct or remove it")
    try:
        settings = GenerationConfig.from_pretrained(str(folder))
        try:
            settings.validate(strict=True)
        except ValueError:
            settings.do_sample = True
            settings.validate(strict=True)
    except Exception as error:  # the file is the user's: whatever a library raises here is about it
        raise UserError(f"{file}: cannot be used ({first_line(error)}); correct or remove it") from error
    return settings


def _with_adapter(
    transformer: PreTrainedModel,
    location: Location,
    adapter: config.Adapter | None,
    seed: int,
    train: bool,
    new_tokens: range,
) -> tuple[nn.Module, config.Adapter | None]:
    """The model with its saved adapter, or a fresh one, or none; and the adapter's settings."""
    if location.adapter_folder is not None:
        saved = location.adapter
        wrapped = continue_adapter(
            transformer, location.adapter_folder, requested=adapter, saved=saved, trained=train
        )
        return wrapped, adapter or saved
    if adapter is not None:
        return add_adapter(transformer, adapter, seed, new_tokens), adapter
    return transformer, None


def _prepare_score(
    transformer: PreTrainedModel, report: dict[str, Any], folder: Path, *, saved: bool
) -> None:
    """Put the scalar head in fp32: as saved, or zeros on a language model, whose own head is not loaded.

    With zeros every answer starts with the same score, and nothing depends on a random draw.
    """
    score = getattr(transformer, SCORE, None)
    if not isinstance(score, torch.nn.Linear) or score.out_features != 1:
        raise UserError(
            f"{folder}: {type(transformer).__name__} has no scalar head named {SCORE!r}, so it cannot be a reward model"
        )
    if not saved:  # a saved reward model's missing head stays in the report and is refused
        torch.nn.init.zeros_(score.weight)
        # recorded while loading a checkpoint without this head; the class's own conversions include it
        vars(transformer).pop("_weight_conversions", None)
        report["missing_keys"] = set(report["missing_keys"]) - {f"{SCORE}.weight"}
    score.float()
    report["unexpected_keys"] = set(report["unexpected_keys"]) - set(_LANGUAGE_HEADS)


def _check_report(report: dict[str, Any], folder: Path) -> None:
    """UserError for missing weights, which transformers leaves at random with a mere warning, and for others."""
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[f"{kind}_keys"])
        if names:
            raise UserError(
                f"{folder}: {len(names)} {kind} weights, such as {', '.join(names[:3])}; "
                "its weights and its config.json do not belong together: restore the folder"
            )
    if report["error_msgs"]:
        raise UserError(f"{folder}: cannot be loaded ({report['error_msgs'][0]}); restore the folder")
