"""Sampling of answers."""

from pydantic import Field

from tuner.config.base import ConfigBase


class Sampling(ConfigBase):
    """Sampling settings. The noise is a function of (seed, step, index of the answer, position) alone."""

    max_new_tokens: int = Field(default=1024, ge=1)
    """Maximum length of an answer, in tokens, its end token included; longer answers are truncated."""

    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature, for sampling and for log-probabilities alike."""

    top_p: float = Field(default=0.9, gt=0, le=1)
    """Nucleus sampling: sample from the fewest tokens whose probabilities add up to this, above 0 and up to 1; the
    others are never sampled, so never reinforced. Log-probabilities are over the full vocabulary."""

    cache_gib: float = Field(default=4.0, gt=0)
    """Size of the key-value cache, in GiB, which limits how many prompts are answered at once: affects speed and
    memory, and answers only by rounding. InternLM2-7B needs 131 kB per token in bf16."""
