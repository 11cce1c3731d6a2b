"""What may change in a config when a run resumes, and what binds it."""

from __future__ import annotations

from typing import Any

from tuner.config import StageConfig, differences

FREE_ON_RESUME = (
    "tracking",
    "checkpoint.",
    "data.cache",
    "prompts.cache",
    "replay.cache",
    "tokens_per_pass",
    "sampling.cache_gib",
    "gradient_checkpointing",
    "device",
)
"""Config paths that may differ when a run resumes: they do not change the result (the last four: but for
rounding), and whoever ran out of memory needs them."""


def changes_that_bind(old: StageConfig, new: StageConfig) -> list[tuple[str, Any, Any]]:
    """(path, old, new) of the leaves in which two configs differ and a resumed run may not."""
    return [change for change in differences(old, new) if not change[0].startswith(FREE_ON_RESUME)]
