"""Config of the conditional reward model."""

# Narrowing a base field is sound since configs are frozen, but type checkers do not see `frozen` in model_config.
# pyright: reportIncompatibleVariableOverride=false

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.data import Preferences
from tuner.config.evaluation import PairEvaluation
from tuner.config.ranking import FocalRanking
from tuner.config.stage_config import PackedConfig
from tuner.config.training import AdamW, Cosine, Schedule


class RewardModel(PackedConfig):
    """The conditional reward model of InternLM2 (arXiv 2403.17297, 4.2.1): a scalar score for each answer.

    Defaults are the paper's, for full-parameter training; adapters need about ten times the learning rate.
    """

    implementation: ClassVar[str] = "tuner.stages.reward.stage"

    stage: Literal["reward"] = "reward"
    """Name of the stage, in JSON."""

    data: Preferences
    """Preferences to train on."""

    conditions: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Condition name, as in a row's "condition" -> the system prompt the reward model sees: a text, several wordings
    (one is drawn per row), a `.txt` file of wordings, or a ready condition of data_templates/conditions
    (`tuner:helpful` in all languages, `tuner:helpful.en` in one)."""

    reward_token: str | None = "[UNUSED_TOKEN_130]"
    """Token appended to each conversation, from whose hidden state the score is computed; must be in the
    vocabulary. None: the conversation's last token is used."""

    loss: FocalRanking = FocalRanking()
    """Loss per preference pair, and penalty on scores."""

    optimizer: AdamW = AdamW(lr=1e-5, weight_decay=0.01)
    """Optimizer settings."""

    schedule: Schedule = Cosine(final=0.5)
    """Learning rate schedule."""

    tokens_per_step: int = Field(default=16_384, ge=1)
    """Tokens per optimizer step, over all devices. The paper's batch size is in tokens too, not pairs."""

    tokens_per_pass: int = Field(default=16_384, ge=1)
    """Tokens in one forward and backward pass: affects memory and speed, never the result. The answers of a row always
    share a pass."""

    evaluation: PairEvaluation = PairEvaluation()
    """Evaluation on held-out preferences."""

    @model_validator(mode="after")
    def _a_pair_fits_a_pass(self) -> Self:
        if 2 * self.data.max_length > self.tokens_per_pass:
            raise ValueError(
                f"two answers of data.max_length ({self.data.max_length}) are more than tokens_per_pass "
                f"({self.tokens_per_pass}), and a pair is never split: lower the first to {self.tokens_per_pass // 2} "
                f"or raise the second to {2 * self.data.max_length}"
            )
        return self

    @model_validator(mode="after")
    def _reward_token_is_text_where_it_is_spelled(self) -> Self:
        token = self.reward_token
        if token is not None and self.data.spelled_tokens.get(token, "text") != "text":
            raise ValueError(
                f"data.spelled_tokens: {token} is the reward token, and an answer that could spell it would choose "
                'where its score is read; write "text", or leave it out'
            )
        return self

    @model_validator(mode="after")
    def _conditions_have_text(self) -> Self:
        for name, prompts in self.conditions.items():
            texts = (prompts,) if isinstance(prompts, str) else prompts
            if not name.strip() or not texts or not all(text.strip() for text in texts):
                raise ValueError(f"conditions: {name!r} has no text; write its system prompt, or remove it")
        return self
