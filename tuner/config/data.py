"""What is learned from: sources of rows, how they are rendered, which tokens are learned."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tuner.config.base import ConfigBase
from tuner.config.functions import name_function


def _name_shape(value: Any) -> Any:
    return value if isinstance(value, str) and value.isidentifier() else name_function(value)


class Source(ConfigBase):
    """Rows from one place: a JSONL or Parquet file or pattern, a hub dataset, or `tuner:...` (shipped)."""

    path: str = Field(min_length=1)
    """`data/*.jsonl`, `data/x.parquet`, `org/dataset` on the hub, or `tuner:sums/train.jsonl`."""

    shape: Annotated[str | Callable[..., Any] | None, BeforeValidator(_name_shape)] = None
    """Name of a row shape (data_templates/rows shows them); None recognizes it from the first row. A function turns a
    row (dict) into {"messages": ...}."""

    split: str = "train"
    """Which split of a hub dataset."""

    subset: str | None = None
    """Which configuration of a hub dataset, or which of its folders."""

    share: float | None = Field(default=None, gt=0)
    """Relative share of the tokens, or prompts, drawn from here while it lasts; never a row twice in an epoch."""

    weight: float = Field(default=1.0, gt=0)
    """Weight in the loss of every token, or pair of answers, learned from here."""

    condition: str | None = None
    """Of preferences and prompts: the condition of rows that name none."""

    system: str | None = None
    """Of prompts: the system turn the policy sees, put before those that have none."""

    limit: int | None = Field(default=None, ge=1)
    """Use the first so many rows only."""


class Split(ConfigBase):
    """Shares of the rows held out, chosen by a hash of their content, so that duplicates never cross."""

    validation: float = Field(default=0.0, ge=0, lt=1)
    """Share whose loss is measured during training."""

    test: float = Field(default=0.0, ge=0, lt=1)
    """Share whose loss and answers are measured before and after training."""

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} + test {self.test} leaves nothing to train on")
        return self


class _Rows(ConfigBase):
    _foreign: ClassVar[dict[str, str]] = {"condition": "preferences and prompts", "system": "prompts"}
    """Fields of a source that this kind of rows has not -> the kinds that have them."""

    files: tuple[str | Source, ...] = Field(min_length=1)
    """Where the rows come from: paths, or Source(path=..., share=..., weight=...)."""

    validation_files: tuple[str | Source, ...] = ()
    """Rows whose loss is measured during training, beside those of `split`."""

    test_files: tuple[str | Source, ...] = ()
    """Rows measured before and after training, beside those of `split`."""

    max_length: int = Field(default=2048, ge=2)
    """Longest sample, in tokens."""

    split: Split = Split()
    """Shares of `files` held out."""

    duplicates: Literal["keep", "drop"] = "keep"
    """What becomes of rows that are equal to the letter; they are counted either way."""

    limit: int | None = Field(default=None, ge=1)
    """Use the first so many rows of each source only."""

    cache: str | None = None
    """Folder of the tokenised cache; None: $TUNER_CACHE or ~/.cache/tuner."""

    @property
    def sources(self) -> tuple[Source, ...]:
        return _as_sources(self.files, self.limit)

    @property
    def validation_sources(self) -> tuple[Source, ...]:
        return _as_sources(self.validation_files, self.limit)

    @property
    def test_sources(self) -> tuple[Source, ...]:
        return _as_sources(self.test_files, self.limit)

    @model_validator(mode="after")
    def _shares_are_all_or_none(self) -> Self:
        shares = [source.share for source in self.sources]
        if None in shares and any(share is not None for share in shares):
            raise ValueError("files: give every source a share, or none of them")
        return self

    @model_validator(mode="after")
    def _sources_are_of_this_kind(self) -> Self:
        for source in (*self.sources, *self.validation_sources, *self.test_sources):
            for field, kinds in self._foreign.items():
                if getattr(source, field) is not None:
                    raise ValueError(
                        f"files: {source.path} has a {field}, which only {kinds} have; leave it out"
                    )
        return self


class Chat(_Rows):
    """Conversations, rendered by a chat template; assistant turns and their end tokens are learned."""

    kind: Literal["chat"] = "chat"
    """Which kind of data this is, in JSON."""

    template: str = "tokenizer"
    """A name from data_templates/chat, "tokenizer" (the model's own), or a path ending in .jinja."""

    system: str | None = None
    """System turn put before conversations that have none."""

    learn: Literal["assistant", "last", "all"] = "assistant"
    """Every assistant turn, the last one only, or every token. A turn's own "learn" or "weight" goes first."""

    too_long: Literal["error", "drop", "cut"] = "error"
    """What becomes of a sample over max_length: an error naming the row, dropped, or its end cut; counted."""


class Text(_Rows):
    """Raw text for continued pre-training: every token is learned, documents end with the end token."""

    kind: Literal["text"] = "text"
    """Which kind of data this is, in JSON."""

    too_long: Literal["split", "error", "drop", "cut"] = "split"
    """What becomes of a document over max_length: split into pieces (nothing lost), an error, dropped, or cut."""


class Preferences(_Rows):
    """Answers to the same prompt, the better ones known: pairs (chosen and rejected) or ranked lists."""

    _foreign: ClassVar[dict[str, str]] = {"system": "prompts"}

    kind: Literal["preferences"] = "preferences"
    """Which kind of data this is, in JSON."""

    template: str = "tokenizer"
    """A name from data_templates/chat, "tokenizer" (the model's own), or a path ending in .jinja."""

    max_length: int = Field(default=2048, ge=4)
    """Longest conversation with one answer, in tokens, the reward token among them."""

    too_long: Literal["error", "drop", "cut"] = "error"
    """What becomes of a row with a longer one: an error naming it, dropped, or the oldest tokens of its prompt cut,
    as many from each answer's; system turns and answers stay whole. Counted."""

    incomparable: Literal["error", "drop"] = "error"
    """What becomes of rows whose answers are the same or answer different prompts: an error naming the row, or
    dropped, as HH-RLHF's few need. Counted."""

    ties: Literal["drop", "half"] = "drop"
    """What becomes of answers of the same rank: no pair, or a pair each way at half the weight. Counted."""


class Prompts(_Rows):
    """What a policy is asked: conversations that end where it is to answer. Answers in the rows are not learned."""

    _foreign: ClassVar[dict[str, str]] = {}

    kind: Literal["prompts"] = "prompts"
    """Which kind of data this is, in JSON."""

    template: str = "tokenizer"
    """A name from data_templates/chat, "tokenizer" (the model's own), or a path ending in .jinja."""

    system: str | None = None
    """System turn the policy sees before prompts that have none, where their source names no other."""

    max_length: int = Field(default=1024, ge=1)
    """Longest prompt, in tokens, the header of the answer among them; longer ones are skipped and counted."""

    @model_validator(mode="after")
    def _prompts_are_drawn_and_not_weighed(self) -> Self:
        given = (*self.sources, *self.test_sources)
        if weighed := [source.path for source in given if source.weight != 1]:
            raise ValueError(
                f"files: {weighed[0]} has a weight, which prompts do not; write share, for how many are drawn from it"
            )
        return self

    @model_validator(mode="after")
    def _test_prompts_are_the_held_out_ones(self) -> Self:
        if self.validation_files or self.split.validation:
            raise ValueError(
                "prompts have no validation part, for evaluation during training answers the test prompts; "
                "write test_files or split.test"
            )
        return self


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


Data = Chat | Text | Preferences


def _as_sources(files: tuple[str | Source, ...], limit: int | None) -> tuple[Source, ...]:
    sources = (Source(path=file) if isinstance(file, str) else file for file in files)
    return tuple(
        source.model_copy(update={"limit": min(limit, source.limit or limit)}) if limit else source
        for source in sources
    )
