"""Config of supervised fine-tuning and continued pre-training."""

# Narrowing a base field is sound since configs are frozen, but type checkers do not see `frozen` in model_config.
# pyright: reportIncompatibleVariableOverride=false

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.data import Chat, Text
from tuner.config.evaluation import Evaluation
from tuner.config.stage_config import PackedConfig


class SFT(PackedConfig):
    """Supervised fine-tuning, or continued pre-training: full, LoRA or QLoRA."""

    implementation: ClassVar[str] = "tuner.stages.sft.stage"

    stage: Literal["sft"] = "sft"
    """Name of the stage, in JSON."""

    data: Annotated[Chat | Text, Field(discriminator="kind")]
    """Conversations or texts to train on."""

    evaluation: Evaluation = Evaluation()
    """Evaluation on held-out rows."""

    @model_validator(mode="after")
    def _samples_fit_a_pass(self) -> Self:
        if self.data.max_length > self.tokens_per_pass:
            raise ValueError(
                f"data.max_length ({self.data.max_length}) is more than tokens_per_pass "
                f"({self.tokens_per_pass}), and samples are never truncated to fit: lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _score_needs_answers(self) -> Self:
        if self.evaluation.score is None:
            return self
        if not (self.data.split.test or self.data.test_files):
            raise ValueError(
                "evaluation.score needs test rows: add data.test_files or data.split=Split(test=0.02)"
            )
        if self.data.kind == "text" or self.data.learn == "all":
            raise ValueError(
                'evaluation.score compares answers, but data has none apart: write data.learn="assistant", or leave '
                "score out"
            )
        return self
