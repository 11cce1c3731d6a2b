"""How a policy answers, what it goes on learning beside its answers, and what is measured of it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tuner.config.data import Chat, Text, _Rows
from tuner.config.part import Function, Part
from tuner.config.training import Measuring


class Sampling(Part):
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


class Replay(_Rows):
    """Rows of earlier stages, learned beside the rollouts: the report's pre-training mix (arXiv 2403.17297, 4.2.3)."""

    kind: Literal["replay"] = "replay"
    """Which kind of data this is, in JSON."""

    template: str | None = None
    """None: raw text, of which all is learned; for conversations a name from data_templates/chat, "tokenizer", or a
    path ending in .jinja."""

    max_length: int = Field(default=32_768, ge=2)
    """Longest row, in tokens: long ones keep long context alive."""

    too_long: Literal["split", "error", "drop", "cut"] | None = None
    """What becomes of a row over max_length; None: texts are split into pieces, a conversation is an error."""

    coefficient: float = Field(default=0.5, gt=0)
    """Weight of the replayed rows' mean loss beside the policy's."""

    ratio: float = Field(default=0.5, gt=0)
    """Tokens replayed per token of prompts and answers."""

    @property
    def data(self) -> Chat | Text:
        """The rows as the data of an SFT stage."""
        shared = {name: getattr(self, name) for name in _Rows.model_fields}
        if self.template is None:
            return Text(**shared, too_long=self.too_long or "split")
        return Chat(**shared, template=self.template, too_long=self.too_long or "error")  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _test_rows_are_the_held_out_ones(self) -> Self:
        if self.validation_files or self.split.validation:
            raise ValueError(
                "replay has no validation part, for evaluation during training measures the test rows; "
                "write test_files or split.test"
            )
        return self

    @model_validator(mode="after")
    def _conversations_are_not_split(self) -> Self:
        if self.template is not None and self.too_long == "split":
            raise ValueError('replay.too_long="split" is for raw text; write "error", "drop" or "cut"')
        return self


class PolicyEvaluation(Measuring):
    """What is measured on held-out prompts: the learned score, and a gold score by rule."""

    samples: int = Field(default=3, ge=0)
    """Held-out prompts whose answers are shown at each measurement, and answers of every step in rollouts.jsonl."""

    rule: Function | None = None
    """Gold score of an answer, which the policy never learns from: a function (answer, row) -> float in 0..1. The row
    holds the values of the prompt's row, and its "condition". None: the learned score only."""

    temperature: float = Field(default=0.0, ge=0)
    """Of the answers that are measured; 0: greedy."""
