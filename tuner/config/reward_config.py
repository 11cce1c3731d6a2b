"""Config of the conditional reward model."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.data import Preferences
from tuner.config.evaluation import PairEvaluation
from tuner.config.ranking import FocalRanking
from tuner.config.stage_config import PackedConfig
from tuner.config.training import AdamW, Cosine, Schedule


class RewardModel(PackedConfig):
    """The conditional reward model of InternLM2 (arXiv 2403.17297, 4.2.1): one scalar for every answer.

    Defaults are the paper's, for training all weights; adapters want a learning rate about ten times as high.
    """

    implementation: ClassVar[str] = "tuner.stages.reward.stage"

    stage: Literal["reward"] = "reward"
    """Which stage this is, in JSON."""

    data: Preferences
    """What is learned from."""

    conditions: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """System prompt by the name that a row gives as its "condition", for the reward model alone: a text, several
    wordings, of which each row draws one by the seed, a `.txt` file of wordings, or `tuner:helpful` and others of
    data_templates/conditions, in all languages, or `tuner:helpful.en` in one."""

    reward_token: str | None = "[UNUSED_TOKEN_130]"
    """Token put after every conversation, whose hidden state is scored; one of the tokenizer's. None: the score
    is read at the conversation's own last token."""

    loss: FocalRanking = FocalRanking()
    """What a pair costs."""

    optimizer: AdamW = AdamW(lr=1e-5, weight_decay=0.01)
    """How weights follow their gradients."""

    schedule: Schedule = Cosine(final=0.5)
    """How the learning rate moves over the run."""

    tokens_per_step: int = Field(default=16_384, ge=1)
    """What an optimiser step learns from, over all devices, in tokens; the paper's batch, of tokens and not pairs."""

    tokens_per_pass: int = Field(default=16_384, ge=1)
    """What one forward and backward pass holds, in tokens; the answers of a row are never split over passes."""

    evaluation: PairEvaluation = PairEvaluation()
    """What is measured on held-out rows."""

    @model_validator(mode="after")
    def _a_pair_fits_a_pass(self) -> Self:
        if 2 * self.data.max_length > self.tokens_per_pass:
            raise ValueError(
                f"two answers of data.max_length ({self.data.max_length}) are more than tokens_per_pass "
                f"({self.tokens_per_pass}): a pair is never split; lower the first to {self.tokens_per_pass // 2} "
                f"or raise the second to {2 * self.data.max_length}"
            )
        return self

    @model_validator(mode="after")
    def _conditions_say_something(self) -> Self:
        for name, prompts in self.conditions.items():
            texts = (prompts,) if isinstance(prompts, str) else prompts
            if not name.strip() or not texts or not all(text.strip() for text in texts):
                raise ValueError(f"conditions: {name!r} has no text; write its system prompt, or take it out")
        return self
