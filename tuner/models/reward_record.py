"""The record of a saved reward model, `reward.json` beside its weights: the inputs it was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field

from tuner.config.data import Reading
from tuner.data.control_tokens import reward_readings
from tuner.errors import UserError
from tuner.models.base_record import FILE as BASE_RECORD
from tuner.models.folder_files import STRICT, read_file
from tuner.models.internlm2 import MODEL_TYPE
from tuner.models.load import Loaded
from tuner.models.model_file import FILE as MODEL_FILE
from tuner.models.model_file import read_model_file

FILE = "reward.json"


@dataclass(frozen=True)
class Reference:
    """Statistics of the scores on held-out prompts, by which scores are standardized."""

    __pydantic_config__ = STRICT

    mean: float
    standard_deviation: Annotated[float, Field(ge=0)]
    answers: Annotated[int, Field(ge=0)]
    """Number of answers scored."""

    def standardized(self, score: float) -> float:
        """A score in standard deviations above the mean; 0 where all scores were equal."""
        return (score - self.mean) / self.standard_deviation if self.standard_deviation else 0.0


@dataclass(frozen=True)
class RewardRecord:
    """The content of reward.json."""

    __pydantic_config__ = STRICT

    reward_token: str | None
    """Token appended to every conversation, at which the score is read; None: the conversation's last token."""
    conditions: Mapping[str, Annotated[tuple[str, ...], Field(min_length=1)]] = field(default_factory=dict)
    """Condition → the wordings of its system prompt in training."""
    seed: int = 0
    """Seed by which each prompt draws one of the wordings."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Longest conversation trained on, in tokens; None: unknown."""
    spelled_tokens: Mapping[str, Reading] = field(default_factory=dict)
    """How control tokens were read that a turn's text spells, where that is not the default: see ControlTokens."""
    bound: Annotated[float, Field(gt=0)] | None = None
    """Scores were trained to stay within ± this; None: unknown."""
    reference: Reference | None = None
    verdict: tuple[str, ...] | None = None
    """Problems in the report card, a sentence each; None: there is no report card."""

    @property
    def readings(self) -> dict[str, Reading]:
        """How its template reads control tokens that a turn's text spells: `spelled_tokens` and the reward token."""
        return reward_readings(self.spelled_tokens, self.reward_token)


def write_reward_record(folder: Path, record: RewardRecord) -> None:
    """Write reward.json into a model folder, and the reward token into its chat template for tools that render it."""
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False)
    Path(folder, FILE).write_text(text + "\n", encoding="utf-8")
    template = Path(folder, "chat_template.jinja")
    if template.is_file():
        source = _WRITES_TOKEN.sub("", template.read_text(encoding="utf-8"))
        if record.reward_token is not None and not _reader_appends_token(folder):
            # behind a last line break, which Jinja drops, the token would stand on a line of its own
            source = source.removesuffix("\n") + _writes_token(record.reward_token)
        template.write_text(source, encoding="utf-8")


def read_reward_record(loaded: Loaded, folder: Path) -> RewardRecord:
    """The record in a model's folder; where tuner did not write the folder, one made from its config.json.

    Raises UserError when the file cannot be read, or is missing from a folder that tuner wrote.
    """
    file = Path(folder, FILE)
    if not file.is_file():
        if Path(folder, BASE_RECORD).is_file():
            raise UserError(
                f"{file} is missing, so how this model reads a conversation is unknown; restore it or train again"
            )
        token_id = getattr(loaded.transformer.config, "reward_token_id", None)  # of InternLM2's reward models
        token = None if token_id is None else loaded.tokenizer.convert_ids_to_tokens(token_id)
        return RewardRecord(reward_token=token)  # type: ignore[arg-type]
    return read_file(file, RewardRecord)


def known_conditions(folder: Path) -> list[str]:
    """Names of the conditions that a saved reward model was trained on; none without a record."""
    file = Path(folder, FILE)
    return list(read_file(file, RewardRecord).conditions) if file.is_file() else []


def known_readings(folder: Path, tokenizer: Any) -> dict[str, Reading]:
    """The record's `readings` without its model; where tuner did not write the folder, by its config.json."""
    if (file := Path(folder, FILE)).is_file():
        return read_file(file, RewardRecord).readings
    token = read_model_file(folder).reward_token_id if Path(folder, MODEL_FILE).is_file() else None
    return reward_readings({}, None if token is None else tokenizer.convert_ids_to_tokens(token))


def unasked(conditions: Sequence[str], count: int, remedy: str) -> list[str]:
    """A sentence where a conditional reward model scored answers under no condition, as it was never trained to.

    conditions: those it was trained with. count: rows without one. remedy: what the user can do.
    """
    if not conditions or not count:
        return []
    return [
        f"{count:,} rows were scored without a condition, and this reward model was trained under some "
        f"({', '.join(conditions)}): such scores mean little; {remedy}, or name one in the row"
    ]


def set_score_token(loaded: Loaded, reward_token: str | None) -> None:
    """Write settings by which other tools read the score at the right token, in place.

    transformers and vLLM read it at the last token that is not padding, so the padding token must differ from the one
    conversations end with; InternLM2's own code and LMDeploy read it at `reward_token_id`.
    """
    settings = loaded.transformer.config
    tokenizer = cast(Any, loaded.tokenizer)  # transformers adds its special tokens by __getattr__
    end = None if reward_token is None else tokenizer.convert_tokens_to_ids(reward_token)
    settings.reward_token_id = end
    ends = {end, tokenizer.eos_token_id if end is None else end}
    special = {token: text for text, token in tokenizer.get_added_vocab().items()}
    preferred = (
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
    )
    free = [token for token in (*preferred, *sorted(special)) if token is not None and token not in ends]
    if free:
        settings.pad_token_id = free[0]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[0])


_WRITES_TOKEN = re.compile(
    r"\{% if not \(add_generation_prompt or reward_token_follows\) %\}.*?\{% endif %\}\Z", re.S
)


def _writes_token(token: str) -> str:
    """The end of a chat template that writes the reward token, wherever the reader does not append it himself."""
    return f"{{% if not (add_generation_prompt or reward_token_follows) %}}{{{{ {json.dumps(token)} }}}}{{% endif %}}"


def _reader_appends_token(folder: Path) -> bool:
    """Whether it is a model in InternLM2's own layout: the code published with those appends `reward_token_id`."""
    return Path(folder, MODEL_FILE).is_file() and read_model_file(folder).model_type == MODEL_TYPE
