"""Sampling of answers."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from tuner.config.base import ConfigBase


class Sampling(ConfigBase):
    """Sampling settings. The noise is a function of (seed, step, index of the answer, position) alone."""

    max_new_tokens: int = Field(default=1024, ge=1)
    """Maximum length of an answer, in tokens, its end token included; longer answers are truncated."""

    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature, for sampling and for log-probabilities alike."""

    top_p: float = Field(default=0.9, gt=0, le=1)
    """Nucleus sampling: sample from the fewest tokens whose probabilities add up to this, of those that top_k leaves;
    the others are never sampled, so never reinforced. Above 0 and up to 1. Log-probabilities, and so ratios and KL, are
    over the full vocabulary: below 1, KL estimates are biased."""

    top_k: int | None = Field(default=None, ge=1)
    """Sample from this many most likely tokens only; None: from all. Log-probabilities are as with top_p."""

    min_new_tokens: int = Field(default=0, ge=0)
    """Minimum length of an answer, without its end: before it no end token is sampled, and no stop text ends an
    answer."""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer, as its end token does: it is trained up to the token that completes one, and scored
    without it."""

    cache_gib: float = Field(default=4.0, gt=0)
    """Size of the key-value cache, in GiB, which limits how many prompts are answered at once: affects speed and
    memory, and answers only by rounding. InternLM2-7B needs 131 kB per token in bf16."""

    @property
    def is_truncated(self) -> bool:
        """Whether tokens are sampled from another distribution than log-probabilities are of."""
        return self.top_p < 1 or self.top_k is not None or self.min_new_tokens > 0

    @model_validator(mode="after")
    def _answers_can_end(self) -> Self:
        if self.min_new_tokens >= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) leaves no place for an end within max_new_tokens "
                f"({self.max_new_tokens}): lower the first or raise the second"
            )
        return self
