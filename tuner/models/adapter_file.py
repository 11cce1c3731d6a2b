"""adapter_config.json of a PEFT folder: read and checked before peft builds anything from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field

from tuner.errors import UserError
from tuner.models.folder_files import read_file

FILE = "adapter_config.json"

Names = list[str] | str | None
Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class AdapterFile(BaseModel):
    """The fields of a LoRA adapter's file with which an adapter is continued, merged and saved again as it was.

    The file may have others, as long as they say nothing: see `check_settings`.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    peft_type: str
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    revision: str | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Names = None
    exclude_modules: Names = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: (
        list[Annotated[int, Field(ge=0)]] | dict[str, list[Annotated[int, Field(ge=0)]]] | None
    ) = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str | None = True
    inference_mode: bool = False


_INITIALIZATION = {"eva_config", "corda_config", "lora_ga_config", "loftq_config"}
_OF_THE_FILE = {"auto_mapping", "peft_version", "runtime_config"}
_RANDOM = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initializations that leave the base's weights alone."""


def read_adapter_file(folder: Path) -> AdapterFile:
    """The file of a PEFT folder. Raises UserError where it cannot be read or a field has no sensible value."""
    return read_file(Path(folder, FILE), AdapterFile)


def check_settings(values: AdapterFile, defaults: dict[str, Any], file: Path) -> None:
    """Raises UserError where a file says something that changes the computation and is not known here.

    defaults: peft's own of a LoRA adapter. peft ignores fields that it does not know with a mere warning, and builds
    variants whose forward pass needs more than packed rows bring.
    """
    inert = {*AdapterFile.model_fields, *_INITIALIZATION, *_OF_THE_FILE}
    others = cast("dict[str, Any]", values.model_extra)
    for name, value in others.items():
        if name not in inert and value not in (None, False, [], {}, defaults.get(name)):
            raise UserError(
                f"{file}: {name}={value!r} is a variant of LoRA that tuner does not know; merge the adapter with the "
                "tool that trained it, and name the merged folder"
            )
    if values.init_lora_weights not in _RANDOM:
        raise UserError(
            f"{file}: init_lora_weights={values.init_lora_weights!r} has changed the base's weights, too; save the "
            "adapter as an ordinary LoRA with peft (path_initial_model_for_weight_conversion), or merge it there"
        )
