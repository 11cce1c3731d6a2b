"""Fields that TRL's trainers do not support: refused by name instead of ignored."""

from __future__ import annotations

from tuner.config.adapter import Adapter
from tuner.config.data import Preferences
from tuner.config.evaluation import Validation


def refuse_unsupported(
    trainer: str, data: Preferences, adapter: Adapter | None, evaluation: Validation
) -> None:
    """Raise ValueError where a field is set that a trainer, such as "TRL's DPO", does not support."""
    sources = (*data.sources, *data.validation_sources, *data.test_sources)
    for is_set, field, remedy in (
        (any(source.weight != 1 for source in sources), "weight of a source", "leave it out"),
        (any(source.share is not None for source in sources), "share of a source", "leave it out, or use limit"),
        (data.ties == "half", 'data.ties="half"', 'write "drop"'),
        (adapter and adapter.dropout, "adapter.dropout", "write 0"),
        (evaluation.patience or evaluation.keep_best, "evaluation.patience or keep_best", "leave it out"),
    ):  # fmt: skip
        if is_set:
            raise ValueError(f"{field}: {trainer} does not support it; {remedy}")
