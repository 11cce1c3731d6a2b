"""`memory="12GiB"`: the fastest settings whose planned peak fits, from one ladder for every stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner.config import TrainingConfig, override
from tuner.config.memory_size import AUTO, gib
from tuner.config.training import Recomputation
from tuner.errors import UserError
from tuner.stages.memory_savings import RESERVE_GIB, savings, setting_text

if TYPE_CHECKING:
    from tuner.models.memory import MemoryPlan

RECOMPUTATION: Mapping[Recomputation, int] = {False: 1_024, "selective": 1_024, True: 1, "offload": 1}
"""Values of `gradient_checkpointing`, the fastest first -> tokens of the smallest pass with which one is still taken to
be faster than the next. Recomputing all is a third more work in a pass of any size, and copies to the host come on top;
smaller passes repeat what does not depend on their size: kernel launches, and unpacking 4-bit weights. The order and
the numbers are estimates that no GPU has confirmed; they decide about speed alone, never whether a run fits."""
FASTEST_PASS = 8_192
"""Tokens of a pass in one process above which it is hardly faster per token. An estimate, too."""

Settings = Mapping[str, Any]
"""Config path -> value."""


@dataclass(frozen=True)
class Options:
    """What a stage lets `memory` choose beside recomputation: values from the fastest to that which needs least."""

    passes: tuple[int, ...] = ()
    """Of `tokens_per_pass`; none: it stays as written."""
    caches: tuple[float, ...] = ()
    """Of `sampling.cache_gib`, likewise."""
    recomputation: tuple[Recomputation, ...] = tuple(RECOMPUTATION)
    """Of `gradient_checkpointing`."""

    def ladder(self) -> Iterator[Settings]:
        """What a training step may be made with, the fastest first.

        `mlp_tile` is not on it: its products round otherwise, so the config alone decides about it.
        """
        for mode in self.recomputation:
            if not self.passes:
                yield {"gradient_checkpointing": mode}
            for tokens in self.passes:
                if tokens >= min(RECOMPUTATION[mode], self.passes[0]):
                    yield {"tokens_per_pass": tokens, "gradient_checkpointing": mode}


@dataclass(frozen=True)
class Choice:
    """What was chosen for a config's `memory`."""

    memory: str
    """As the config has it."""
    room_gib: float
    """What it leaves to the plan."""
    planned_gib: float
    """The plan's peak."""
    settings: Settings

    def sentence(self) -> str:
        """The choice in a line."""
        size = f"{self.room_gib + RESERVE_GIB:.1f} GiB" + (" free" if self.memory == AUTO else "")
        return f"memory {size} → {settings_text(self.settings)} (planned {self.planned_gib:.2f} GiB)"


def settings_text(settings: Settings) -> str:
    """Settings as on the command line."""
    return ", ".join(setting_text(path, value) for path, value in settings.items())


def room_gib(memory: str, free_gib: float | None) -> float:
    """What a config's `memory` leaves to the plan. free_gib: what the GPU has free; None: there is none.

    Raises UserError for "auto" without a GPU.
    """
    size = free_gib if memory == AUTO else gib(memory)
    if size is None:
        raise UserError(
            'memory="auto" is what the GPU has free, and this run computes on a CPU: write a size, such as '
            '"8GiB", or leave memory out'
        )
    return size - RESERVE_GIB


def pass_sizes(longest: int, share: int, processes_per_row: int = 1) -> tuple[int, ...]:
    """Sizes of a pass, halved from the fastest on. longest: tokens of the longest row, which is never split. share: a
    process's (or a group's that computes rows together) tokens of a step: larger passes would leave others idle."""
    sizes = [max(longest, min(share, FASTEST_PASS * processes_per_row))]
    while sizes[-1] > longest:
        sizes.append(max(longest, sizes[-1] // 2))
    return tuple(sizes)


def choose(
    config: TrainingConfig, options: Options, plan_of: Callable[[Any], MemoryPlan], room: float
) -> Choice:
    """The fastest settings whose planned peak is within some GiB.

    The cache comes first, as answers are most of the time of reinforcement learning: the largest that fits beside the
    smallest passes. plan_of: the plan of a changed config. Raises UserError where nothing fits.
    """
    assert config.memory is not None

    def planned_gib(settings: Settings) -> float:
        return plan_of(override(config, settings)).peak / 2**30

    ladder = list(options.ladder())
    caches: list[Settings] = [{"sampling.cache_gib": size} for size in options.caches] or [{}]
    # not always the last: what waits on the host has buffers on the device
    least = min(ladder, key=lambda rung: planned_gib({**rung, **caches[-1]}))
    cache = next((cache for cache in caches if planned_gib({**least, **cache}) <= room), None)
    if cache is None:
        raise _nothing_fits(config, {**least, **caches[-1]}, plan_of)
    for rung in ladder:
        settings = {**rung, **cache}
        if (planned := planned_gib(settings)) <= room:
            return Choice(config.memory, room, planned, settings)
    raise AssertionError("the least rung fits")


def _nothing_fits(
    config: TrainingConfig, settings: Settings, plan_of: Callable[[Any], MemoryPlan]
) -> UserError:
    least = override(config, settings)
    plan = plan_of(least)
    further = [
        f"{saving.setting} ({saving.saved_gib:.2f} GiB)"
        for saving in savings(least, plan, plan_of)
        if saving.setting.partition("=")[0] not in settings
    ]
    remedy = f"; {' or '.join(further)} would save more" if further else ""
    return UserError(
        f"memory={config.memory!r}: the smallest planned peak is {plan.peak / 2**30:.2f} GiB, with "
        f"{settings_text(settings)}, and CUDA needs {RESERVE_GIB:g} GiB beside it: allow more{remedy}"
    )
