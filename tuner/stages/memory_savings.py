"""Which settings would save most of a run's memory, by planning it again with each of them changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

from tuner.config import StageConfig, override
from tuner.errors import UserError
from tuner.models.memory import MemoryPlan
from tuner.stages.registry import stage_of

Config = TypeVar("Config", bound=StageConfig)

LEAST, LEAST_GIB = 0.01, 0.01
"""Smallest saving worth a line: of the peak, and in GiB, of which two digits are shown."""
CARDS_GIB = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 141, 192)
"""Memory of GPUs that people have."""
MLP_TILE = 2_048
"""Tokens of a tile that fill a GPU."""
RESERVE_GIB = 1.0
"""What a card needs beside the plan: CUDA's context, and what the allocator loses between blocks."""


@dataclass(frozen=True)
class Saving:
    """A change of one setting, and what it saves."""

    setting: str
    """The override, as on the command line."""
    saved_gib: float
    peak_gib: float
    """The peak with it."""


def savings(config: Config, plan: MemoryPlan, plan_of: Callable[[Config], MemoryPlan]) -> tuple[Saving, ...]:
    """The settings that save memory, the largest saving first; each alone. plan_of: the plan of a changed config."""
    worthwhile: list[Saving] = []
    for path, value in _changes(config):
        try:
            saved = plan.peak - plan_of(override(config, {path: value})).peak
        except UserError:  # rows would no longer fit, or a model has no MLP to be tiled, for example
            continue
        if saved >= max(LEAST * plan.peak, LEAST_GIB * 2**30):
            worthwhile.append(Saving(setting_text(path, value), saved / 2**30, (plan.peak - saved) / 2**30))
    return tuple(sorted(worthwhile, key=lambda saving: -saving.saved_gib))


def setting_text(path: str, value: Any) -> str:
    """A changed setting, as on the command line."""
    return f"{path}={str(value).lower() if isinstance(value, bool) else value}"


def smallest_card(peak_gib: float) -> int | None:
    """Memory in GiB of the smallest common card that holds a peak; None where none does."""
    return next((card for card in CARDS_GIB if card >= peak_gib + RESERVE_GIB), None)


def _changes(config: StageConfig) -> Iterator[tuple[str, Any]]:
    """Settings to try: those that a stage names for lack of memory, halved, and what every stage has."""
    for field in stage_of(config).memory_fields:
        value = attrgetter(field)(config)
        yield field, value / 2 if isinstance(value, float) else value // 2
    values: Any = config
    ways = [False, "selective", True, "offload"]  # in the order of what they hold
    of_trl = not values.in_layouts
    for way in ways[ways.index(values.gradient_checkpointing) + 1 :]:
        if not (of_trl and isinstance(way, str)):
            yield "gradient_checkpointing", way
    if not of_trl:
        yield "mlp_tile", MLP_TILE if values.mlp_tile is None else values.mlp_tile // 2
    if values.optimizer.bits != 8:
        yield "optimizer.bits", 8
    model = getattr(values, "model", None)
    if model is not None and model.quantization is None and values.adapter is not None:
        yield "model.quantization", "nf4"
