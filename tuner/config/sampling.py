"""How answers are sampled."""

from pydantic import Field

from tuner.config.base import ConfigBase


class Sampling(ConfigBase):
    """How answers are drawn. The noise is a function of (seed, step, prompt, position) alone."""

    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest answer, in tokens, its end token among them; a longer one is cut off."""

    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by this, when tokens are drawn and when their log-probabilities are taken."""

    top_p: float = Field(default=0.9, gt=0, le=1)
    """Draw from the fewest tokens whose probabilities reach this; log-probabilities are of the whole vocabulary."""

    cache_gib: float = Field(default=4.0, gt=0)
    """Keys and values held at a time, which decides how many prompts are answered at once: speed and memory, and of
    the answers no more than rounding. InternLM2-7B needs 131 kB a token in bf16."""
