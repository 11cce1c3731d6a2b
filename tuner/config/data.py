"""Training data: sources of rows, how rows are rendered, and which tokens the loss is taken on."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tuner.config.base import ConfigBase, PathText
from tuner.config.functions import function_reference


def _shape_reference(value: Any) -> Any:
    """The name of a row shape unchanged, a function as "file.py:name"."""
    return value if isinstance(value, str) and value.isidentifier() else function_reference(value)


Droppable = Literal["images", "tools", "calls", "reasoning", "text"]
"""What a row may hold that does not reach its text."""


def _as_tuple(value: Any) -> Any:
    """A single name as a tuple of it."""
    return (value,) if isinstance(value, str) else value


Reading = Literal["text", "answers", "token"]
"""How a control token is read that a text spells."""

Drop = Annotated[tuple[Droppable, ...], BeforeValidator(_as_tuple)]


class Source(ConfigBase):
    """A source of rows: a file or glob, a saved dataset, a dataset on the hub, or a file shipped with tuner."""

    path: PathText = Field(min_length=1)
    """File or glob (`data/*.jsonl`, `data/x.parquet`), folder of `save_to_disk`, hub dataset (`org/dataset`), or
    shipped file (`tuner:sums/train.jsonl`)."""

    shape: Annotated[str | Callable[..., Any] | None, BeforeValidator(_shape_reference)] = None
    """Row shape: a name from data_templates/rows, or a function (row) -> row that converts a row (dict) to one of
    them; None: recognized from the first row."""

    split: str = "train"
    """Split of a hub dataset, or of a folder of `save_to_disk` that has several."""

    subset: str | None = None
    """Configuration of a hub dataset, or one of its folders."""

    share: float | None = Field(default=None, gt=0)
    """Sampling weight relative to the other sources, in tokens (prompts: in rows), until the source is exhausted; no
    row is repeated within an epoch. None: all rows are shuffled together."""

    weight: float = Field(default=1.0, gt=0)
    """Factor on the loss weight of each token, or preference pair, from this source."""

    condition: str | None = None
    """Condition of rows without a "condition" of their own (preferences and prompts only)."""

    system: str | None = None
    """System turn added, for the policy alone, to prompts without one (prompts only)."""

    limit: int | None = Field(default=None, ge=1)
    """Number of rows used, from the first on; None: all."""


class Split(ConfigBase):
    """Held-out fractions. Rows are assigned by a hash of their content, so that duplicates never cross the split."""

    validation: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the rows held out for validation during training, from 0 to below 1."""

    test: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the rows held out for the test before and after training, from 0 to below 1."""

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation ({self.validation}) + test ({self.test}) leaves nothing to train on: lower one of them"
            )
        return self


class ShortRows(ConfigBase):
    """How much of the training is on short rows, whatever their number: long-context training on long rows alone costs
    a model its short tasks (InternLM2, arXiv 2403.17297, keeps half of the data under 4k tokens)."""

    below: int = Field(default=4_096, ge=2)
    """Rows of fewer tokens than this are short; of a document that is split, its pieces count."""

    share: float = Field(default=0.5, gt=0, lt=1)
    """Fraction of the tokens that short rows have, until they or the long ones are exhausted. Among the short, and
    among the long, sources keep their own shares."""


class DataConfig(ConfigBase):
    """Fields shared by every kind of training data."""

    _unsupported_fields: ClassVar[dict[str, str]] = {
        "condition": "preferences and prompts",
        "system": "prompts",
    }
    """Fields of a source that have no meaning here -> the kinds of data that support them."""

    files: tuple[PathText | Source, ...] = Field(min_length=1)
    """Sources of the rows: paths, or Source(path=..., share=..., weight=...)."""

    validation_files: tuple[PathText | Source, ...] = ()
    """Sources of validation rows, in addition to those held out by `split`."""

    test_files: tuple[PathText | Source, ...] = ()
    """Sources of test rows, in addition to those held out by `split`."""

    max_length: int = Field(default=2048, ge=2)
    """Maximum length of a sample, in tokens."""

    split: Split = Split()
    """Fractions of `files` held out for validation and test."""

    duplicates: Literal["keep", "drop"] = "keep"
    """Whether identical rows are kept or dropped; they are counted either way."""

    limit: int | None = Field(default=None, ge=1)
    """Number of rows used of each source, from the first on; None: all."""

    spelled_tokens: dict[str, Reading] = Field(default_factory=dict)
    """Added token of the tokenizer -> how it is encoded where a turn's text spells it: as "text", as the "token", or as
    the token in "answers" (the assistant's turns) and as text elsewhere. Without an entry it is as `tuner data` shows:
    turn markers and other special tokens as text; <think>, <tool_call> and other added tokens as tokens; in raw text,
    all as tokens."""

    cache: PathText | None = None
    """Cache folder for tokenized rows; None: $TUNER_CACHE or ~/.cache/tuner."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of `files`, with `limit` applied."""
        return _as_sources(self.files, self.limit)

    @property
    def validation_sources(self) -> tuple[Source, ...]:
        """The sources of `validation_files`, with `limit` applied."""
        return _as_sources(self.validation_files, self.limit)

    @property
    def test_sources(self) -> tuple[Source, ...]:
        """The sources of `test_files`, with `limit` applied."""
        return _as_sources(self.test_files, self.limit)

    @model_validator(mode="after")
    def _shares_are_all_or_none(self) -> Self:
        shares = [source.share for source in self.sources]
        if None in shares and any(share is not None for share in shares):
            raise ValueError(
                "files: some sources have a share and others do not; give every source a share, or none of them"
            )
        return self

    @model_validator(mode="after")
    def _source_fields_are_supported(self) -> Self:
        for source in (*self.sources, *self.validation_sources, *self.test_sources):
            for field, kinds in self._unsupported_fields.items():
                if getattr(source, field) is not None:
                    raise ValueError(
                        f"files: {source.path} has a {field}, which only {kinds} have; leave it out"
                    )
        return self


class Chat(DataConfig):
    """Conversations rendered by a chat template; the loss is taken on assistant turns, their end tokens included."""

    kind: Literal["chat"] = "chat"
    """Kind of data, in JSON."""

    template: PathText = "tokenizer"
    """Chat template: a name from data_templates/chat, "tokenizer" (the model's own), or a path ending in .jinja."""

    system: str | None = None
    """System turn added to conversations without one."""

    drop: Drop = ()
    """Contents for whose loss a row is dropped rather than refused: images, and the tools, calls, reasoning or text
    that the template does not write. Counted in the log."""

    learn: Literal["assistant", "last", "all"] = "assistant"
    """Tokens the loss is taken on: of every assistant turn, of the last one only, or all tokens. A turn's own "learn"
    or "weight" takes precedence."""

    changed_turns: Literal["split", "error"] = "split"
    """Handling of conversations of which the template renders earlier turns differently once others follow, as those
    that keep only the last turn's reasoning: split, so that each learned turn is a sample of its own with all before it
    (learn="last" learns the last one alone), or an error naming the row. Counted in the log."""

    too_long: Literal["error", "drop", "cut"] = "error"
    """Handling of samples longer than max_length: an error naming the row, dropped, or truncated at the end. Counted in
    the log."""

    short_rows: ShortRows | None = None
    """Share of the training tokens that short rows have; None: as they come."""


class Text(DataConfig):
    """Raw text for continued pre-training: the loss is taken on every token; each document ends with the end token."""

    kind: Literal["text"] = "text"
    """Kind of data, in JSON."""

    too_long: Literal["split", "error", "drop", "cut"] = "split"
    """Handling of documents longer than max_length: split into pieces that keep every token, an error naming the row,
    dropped, or truncated at the end. Counted in the log."""

    short_rows: ShortRows | None = None
    """Share of the training tokens that short rows have; None: as they come."""


class Preferences(DataConfig):
    """Preferences between answers to the same prompt: pairs (chosen and rejected) or ranked lists."""

    _unsupported_fields: ClassVar[dict[str, str]] = {"system": "prompts"}

    kind: Literal["preferences"] = "preferences"
    """Kind of data, in JSON."""

    template: PathText = "tokenizer"
    """Chat template: a name from data_templates/chat, "tokenizer" (the model's own), or a path ending in .jinja."""

    drop: Drop = ()
    """Contents for whose loss a row is dropped rather than refused: images, and the tools, calls, reasoning or text
    that the template does not write. Counted in the log."""

    max_length: int = Field(default=2048, ge=4)
    """Maximum length of a prompt with one answer, in tokens, the reward token included."""

    too_long: Literal["error", "drop", "cut"] = "error"
    """Handling of rows longer than max_length: an error naming the row, dropped, or the oldest tokens of the prompt
    removed, equally for every answer; system turns and answers stay whole. Counted in the log."""

    incomparable: Literal["error", "drop"] = "error"
    """Handling of rows whose answers cannot be compared (identical ones, those to different prompts, scores or ranks
    that contradict each other, an empty better answer): an error naming the row, or dropped. Counted in the log."""

    ties: Literal["drop", "half"] = "drop"
    """Handling of answers with equal rank: no pair, or one pair in each direction at half weight. Counted in the
    log."""


class Prompts(DataConfig):
    """Prompts for a policy: conversations up to the turn it answers. Answers in the rows are not trained on."""

    _unsupported_fields: ClassVar[dict[str, str]] = {}

    kind: Literal["prompts"] = "prompts"
    """Kind of data, in JSON."""

    template: PathText = "tokenizer"
    """Chat template: a name from data_templates/chat, "tokenizer" (the model's own), or a path ending in .jinja."""

    system: str | None = None
    """System turn added, for the policy alone, to prompts without one; a source's own `system` takes precedence."""

    drop: Drop = ()
    """Contents for whose loss a row is dropped rather than refused: images, and the tools, calls, reasoning or text
    that the template does not write. Counted in the log."""

    max_length: int = Field(default=1024, ge=1)
    """Maximum length of a prompt, in tokens, the assistant header included; longer prompts are dropped and counted in
    the log."""

    @model_validator(mode="after")
    def _prompts_have_no_weights(self) -> Self:
        for source in (*self.sources, *self.test_sources):
            if source.weight != 1:
                raise ValueError(
                    f"files: {source.path} has a weight, which prompts do not; write share to set how often it is drawn"
                )
        return self

    @model_validator(mode="after")
    def _prompts_have_no_validation_part(self) -> Self:
        if self.validation_files or self.split.validation:
            raise ValueError(
                "prompts have no validation part: evaluation during training answers the test prompts; "
                "write test_files or split.test"
            )
        return self


class Replay(DataConfig):
    """Rows of earlier stages trained on alongside the rollouts.

    This is PPO-ptx (arXiv 2203.02155), and the pre-training mix of InternLM2 (arXiv 2403.17297, 4.2.3).
    """

    kind: Literal["replay"] = "replay"
    """Kind of data, in JSON."""

    template: PathText | None = None
    """Chat template of conversations: a name from data_templates/chat, "tokenizer" (the model's own), or a path ending
    in .jinja; None: raw text."""

    drop: Drop = ()
    """Contents for whose loss a row is dropped rather than refused: images, and the tools, calls, reasoning or text
    that the template does not write. Counted in the log."""

    max_length: int = Field(default=32_768, ge=2)
    """Maximum length of a row, in tokens; long rows preserve long-context ability."""

    too_long: Literal["split", "error", "drop", "cut"] | None = None
    """Handling of rows longer than max_length; None: "split" for raw text, "error" for conversations."""

    coefficient: float = Field(default=0.5, gt=0)
    """Coefficient of the mean loss on replayed rows, added to the policy's loss."""

    ratio: float = Field(default=0.5, gt=0)
    """Replayed tokens per token of the rollout (prompts and answers)."""

    @property
    def data(self) -> Chat | Text:
        """The same rows as data for supervised fine-tuning."""
        shared = {name: getattr(self, name) for name in DataConfig.model_fields}
        if self.template is None:
            return Text(**shared, too_long=self.too_long or "split")
        return Chat(**shared, template=self.template, drop=self.drop, too_long=self.too_long or "error")  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _replay_has_no_validation_part(self) -> Self:
        if self.validation_files or self.split.validation:
            raise ValueError(
                "replay has no validation part: evaluation during training measures the test rows; "
                "write test_files or split.test"
            )
        return self

    @model_validator(mode="after")
    def _conversations_are_not_split(self) -> Self:
        if self.template is not None and self.too_long == "split":
            raise ValueError('replay.too_long="split" is for raw text; write "error", "drop" or "cut"')
        return self


Data = Chat | Text | Preferences


def _as_sources(files: tuple[PathText | Source, ...], limit: int | None) -> tuple[Source, ...]:
    """Paths as sources; each limited to the smaller of its own limit and `limit`."""
    sources = (Source(path=file) if isinstance(file, str) else file for file in files)
    return tuple(
        source.model_copy(update={"limit": min(limit, source.limit or limit)}) if limit else source
        for source in sources
    )
