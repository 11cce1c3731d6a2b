"""config.json and generation_config.json: the fields that tuner reads itself. transformers reads them all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tuner.errors import UserError
from tuner.models.folder_files import first_line, read_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FILE = "config.json"

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class ModelFile(BaseModel):
    """Fields of config.json; it has others."""

    model_config = ConfigDict(strict=True, extra="allow")

    model_type: str = ""
    architectures: list[str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    quantization_config: dict[str, Any] | None = None
    num_labels: int | None = None
    max_position_embeddings: int | None = Field(default=None, ge=1)
    reward_token_id: TokenId | None = None
    """Of InternLM2's reward models."""

    @property
    def has_score(self) -> bool:
        """Whether the model ends in a scalar head."""
        return (self.architectures or [""])[0].endswith(("ForSequenceClassification", "ForRewardModel"))

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """Precision of the weights in the file."""
        return "fp32" if (self.dtype or self.torch_dtype) == "float32" else "bf16"


class GenerationFile(BaseModel):
    """Fields of generation_config.json that tuner reads itself; it has others."""

    model_config = ConfigDict(strict=True, extra="allow")

    eos_token_id: TokenId | list[TokenId] | None = None


def read_model_file(folder: Path) -> ModelFile:
    """config.json of a folder. Raises UserError where it cannot be read or a field has no sensible value."""
    return read_file(Path(folder, FILE), ModelFile, "restore it")


def read_transformers_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """transformers' configuration of a model folder. Raises UserError where its file cannot be read."""
    # slow: a folder that is refused by its files alone is refused before it
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # the file is the user's: whatever a library raises here is about it
        hint = (
            "" if trust_remote_code else ", or set model.trust_remote_code=true if it needs code of its own"
        )
        raise UserError(
            f"{folder}/config.json: cannot be read ({first_line(error)}); restore it{hint}"
        ) from error
