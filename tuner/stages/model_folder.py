"""A run's model as a folder: at its end, and of any checkpoint in between.

A checkpoint holds trained weights only. The model around them is loaded as the run loaded it at its start, so a stage
says how in `Stage.trained_model`, and what stands beside the weights in `Stage.write_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from tuner.config import Adapter, Freeze, Model, TrainingConfig
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.models.adapters import ADAPTER, is_adapted, is_of
from tuner.models.atomic_folder import write_atomically
from tuner.models.load import Head, Loaded, Precision, load_model
from tuner.models.locate import locate
from tuner.models.save import save_model
from tuner.training.checkpoint_names import seal_of
from tuner.training.run_folder import RunFolder
from tuner.training.seal import BrokenSealError, sealed_values
from tuner.training.snapshot import SavedWeights


@dataclass(frozen=True)
class TrainedModel:
    """The model that a run trains and saves, as it is before the first step."""

    model: Model
    adapter: Adapter | None
    template: str | None
    """Chat template it is trained with; None for raw text."""
    freeze: Freeze | None = None
    head: Head = "language"


def write_model_folder(
    loaded: Loaded,
    template: str | None,
    folder: Path,
    write_beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a trained model, whole or not at all. write_beside: writes further files into its folder."""

    def write(unfinished: Path) -> None:
        save_model(loaded, unfinished)
        write_beside(unfinished)

    publish_template(loaded, template)
    write_atomically(folder, write)


def publish_template(loaded: Loaded, template: str | None) -> None:
    """Give the tokenizer the template that other tools prompt the model by, as it is trained; None: leave it."""
    if template is not None:
        tokenizer: Any = loaded.tokenizer
        tokenizer.chat_template = Template(template, tokenizer).published


def write_checkpoint_model(
    run: RunFolder, checkpoint: Path, folder: Path, *, model: Model | None = None
) -> None:
    """Write the model that a checkpoint of a run holds. model: in place of the one that the run's config begins with.

    Raises UserError where the checkpoint is damaged, or the run's base is gone or another than it was.
    """
    from tuner.stages.registry import stage_of  # stages import this module

    config = cast("TrainingConfig", run.config)  # which has checkpoints
    stage = stage_of(config)
    start = stage.trained_model(config)
    if model is not None:
        start = replace(start, model=model)
    _refuse_another_base(run, start.model, config.precision)
    loaded = _with_weights(start, config, stage.weights_of_model(trained_weights(checkpoint)), checkpoint)
    stage.write_model(config, loaded, folder)


def trained_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The trained weights in a checkpoint. Raises UserError where it is not as it was written."""
    check_checkpoint(checkpoint)
    saved = SavedWeights(checkpoint)
    return {name: saved.read(name) for name in saved.names}


def check_checkpoint(checkpoint: Path) -> None:
    """Raise UserError where a checkpoint is not as it was written."""
    try:
        sealed_values(checkpoint, seal_of(checkpoint).name)
    except BrokenSealError as error:
        raise UserError(
            f"{checkpoint}: this checkpoint is damaged ({error}), so it is no model; name another one"
        ) from error


def _with_weights(
    start: TrainedModel, config: TrainingConfig, weights: Mapping[str, torch.Tensor], checkpoint: Path
) -> Loaded:
    """The model with a checkpoint's weights. An adapter's base is not read, as its folder needs nothing of it."""
    has_adapter = start.adapter is not None or locate(start.model, weights=False).adapter_folder is not None
    loaded = _load(start, config, torch.device("meta" if has_adapter else "cpu"))
    trained = {name for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    if trained != set(weights):
        raise UserError(
            f"{checkpoint}: this checkpoint trains other weights than the run's config does: was the model replaced?"
        )
    if _lacks_weights(loaded, trained):  # some of the adapter's are frozen, and were never saved
        loaded = _load(start, config, torch.device("cpu"))
    for name, weight in weights.items():
        _set_weight(loaded.model, name, weight)
    reference = locate(start.model, config.precision).reference  # with the fingerprint, which meta leaves out
    base = replace(loaded.base, fingerprint=reference.fingerprint, precision=config.precision)
    return replace(loaded, base=base)


def _set_weight(model: torch.nn.Module, name: str, weight: torch.Tensor) -> None:
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        with torch.no_grad():
            parameter.copy_(weight)  # in place: tied weights stay one
        return
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, torch.nn.Parameter(weight, requires_grad=False))


def _lacks_weights(loaded: Loaded, trained: set[str]) -> bool:
    """Whether a model without weights lacks some that its folder needs, beside the trained ones."""
    return is_adapted(loaded.model) and any(
        weight.is_meta and is_of(name, ADAPTER) and name not in trained
        for name, weight in loaded.model.named_parameters()
    )


def _load(start: TrainedModel, config: TrainingConfig, device: torch.device) -> Loaded:
    return load_model(
        start.model,
        precision=config.precision,
        device=device,
        adapter=start.adapter,
        freeze=start.freeze,
        seed=config.seed,
        head=start.head,
    )


def _refuse_another_base(run: RunFolder, model: Model, precision: Precision) -> None:
    """UserError where the run was bound to another base than is there now."""
    pinned = run.read_json("base") or run.read_json("policy") or {}
    fingerprint = locate(model, precision).reference.fingerprint
    if fingerprint not in str(pinned.get("fingerprint", fingerprint)):
        raise UserError(
            f"{run.folder}: its base {model.path} is another than when it was trained; put the old one back"
        )
