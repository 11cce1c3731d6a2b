"""What a saved reward model says of itself, beside its weights in `reward.json`: how it is to be asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tuner.errors import UserError
from tuner.models.base_record import FILE as BASE_RECORD
from tuner.models.load import Loaded

FILE = "reward.json"


@dataclass(frozen=True)
class Reference:
    """Scores on held-out prompts: what a score means, in spreads from the mean."""

    mean: float
    spread: float
    """Standard deviation."""
    answers: int
    """How many were scored."""

    def standardised(self, score: float) -> float:
        """Spreads above the mean."""
        return (score - self.mean) / self.spread if self.spread else 0.0


@dataclass(frozen=True)
class RewardRecord:
    """The content of reward.json."""

    reward_token: str | None
    """Ends every conversation; its hidden state is scored. None: the last token of the conversation itself."""
    conditions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The wordings each condition was trained with."""
    seed: int = 0
    """By which a prompt draws its wording."""
    max_length: int | None = None
    """Longest conversation trained on, in tokens; None: not known."""
    bound: float | None = None
    """Scores were trained to stay within plus and minus this."""
    reference: Reference | None = None
    verdict: tuple[str, ...] | None = None
    """What the report card found wrong, in sentences; None: there is no report card."""


def write_reward_record(folder: Path, record: RewardRecord) -> None:
    """Write reward.json into a model folder."""
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False)
    Path(folder, FILE).write_text(text + "\n", encoding="utf-8")


def read_reward_record(loaded: Loaded, folder: Path) -> RewardRecord:
    """The record in a model's folder; of a reward model made elsewhere, what its config.json tells.

    Raises UserError when the file makes no sense, or is missing from a folder that tuner wrote.
    """
    file = Path(folder, FILE)
    if not file.is_file():
        if Path(folder, BASE_RECORD).is_file():
            raise UserError(
                f"{file}: how this reward model is to be asked is missing; restore it or train again"
            )
        number = getattr(
            loaded.transformer.config, "reward_token_id", None
        )  # InternLM2's reward models have one
        token = None if number is None else loaded.tokenizer.convert_ids_to_tokens(number)
        return RewardRecord(reward_token=token)  # type: ignore[arg-type]
    return _read(file)


def known_conditions(folder: Path) -> list[str]:
    """Names of the conditions that a saved reward model knows; none of one made elsewhere."""
    file = Path(folder, FILE)
    return list(_read(file).conditions) if file.is_file() else []


def tell_others(loaded: Loaded, reward_token: str | None) -> None:
    """Settings by which tools that know nothing of us read the score at the right token.

    transformers and vLLM read it at the last token that is no padding, so that padding must be another token than
    the one conversations end with; InternLM2's own code and LMDeploy look for `reward_token_id`.
    """
    tokenizer, settings = loaded.tokenizer, loaded.transformer.config
    end = None if reward_token is None else tokenizer.convert_tokens_to_ids(reward_token)
    settings.reward_token_id = end
    ends = {end, tokenizer.eos_token_id if end is None else end}
    special = {token: text for text, token in tokenizer.get_added_vocab().items()}
    usual = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    free = [token for token in (*usual, *sorted(special)) if token is not None and token not in ends]
    if free:
        settings.pad_token_id = free[0]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[0])


def _read(file: Path) -> RewardRecord:
    try:
        return _record(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: not the record of a reward model ({error}); restore it or train again"
        ) from error


def _record(values: dict[str, Any]) -> RewardRecord:
    reference = values.pop("reference", None)
    verdict = values.pop("verdict", None)
    conditions = {name: tuple(texts) for name, texts in values.pop("conditions", {}).items()}
    return RewardRecord(
        **values,
        conditions=conditions,
        reference=None if reference is None else Reference(**reference),
        verdict=None if verdict is None else tuple(verdict),
    )
