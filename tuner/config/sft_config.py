"""Config of supervised fine-tuning and continued pre-training."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.data import Chat, Text
from tuner.config.evaluation import Evaluation
from tuner.config.stage_config import PackedConfig


class SFT(PackedConfig):
    """Supervised fine-tuning, or continued pre-training: full, LoRA or QLoRA."""

    implementation: ClassVar[str] = "tuner.stages.sft.stage"

    stage: Literal["sft"] = "sft"
    """Which stage this is, in JSON."""

    data: Annotated[Chat | Text, Field(discriminator="kind")]
    """What is learned from."""

    evaluation: Evaluation = Evaluation()
    """What is measured on held-out rows."""

    @model_validator(mode="after")
    def _a_sample_fits_a_pass(self) -> Self:
        if self.data.max_length > self.tokens_per_pass:
            raise ValueError(
                f"data.max_length ({self.data.max_length}) is more than tokens_per_pass "
                f"({self.tokens_per_pass}): a sample is never cut to fit; lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _a_score_needs_answers(self) -> Self:
        if self.evaluation.score is None:
            return self
        if not (self.data.split.test or self.data.test_files):
            raise ValueError(
                "evaluation.score needs test rows: add data.test_files or data.split=Split(test=0.02)"
            )
        if self.data.kind == "text" or self.data.learn == "all":
            raise ValueError("evaluation.score compares answers: learn assistant turns, or leave score out")
        return self
