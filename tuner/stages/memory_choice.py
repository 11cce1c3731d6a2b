"""What a config's `memory` chooses: for a run, whose folder keeps it, and for a check."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

from tuner.config import StageConfig, TrainingConfig, override
from tuner.config.memory_size import AUTO
from tuner.config.training import Recomputation
from tuner.errors import UserError
from tuner.stages.memory_budget import Choice, choose, room_gib, settings_text
from tuner.stages.memory_savings import RESERVE_GIB
from tuner.stages.registry import stage_of
from tuner.training.launch_settings import layout
from tuner.training.run_folder import RunFolder

if TYPE_CHECKING:  # imports torch
    from tuner.stages.context import Context

Config = TypeVar("Config", bound=StageConfig)

RECORD = "memory"
"""Name of the JSON file in a run's folder that keeps its choice."""


def with_chosen_memory(config: Config, context: Context) -> Config:
    """The config with the settings that its `memory` chooses. All ranks call it together; the main one decides.

    A run that has taken a step keeps its settings, so that it goes on as if it had never stopped; with another
    `memory` or layout of its processes it chooses anew. Raises UserError where nothing fits.
    """
    if not isinstance(config, TrainingConfig) or config.memory is None:
        return config
    devices, run = context.devices, context.run
    made_for = {"memory": config.memory, "processes": devices.world, "parallel": layout(config).model_dump()}
    kept: Choice | None = devices.gather([_kept(run, made_for) if devices.is_main else None])[0]
    if kept is not None:
        context.say(f"{kept.sentence()}, as this run began")
        return override(config, kept.settings)
    on_cpu = devices.device.type == "cpu"
    free: list[float | None] = devices.gather([devices.free_gib()]) if config.memory == AUTO else [None]
    least_free = min((gib for gib in free if gib is not None), default=None)
    room = room_gib(config.memory, least_free)
    choice: Choice = devices.gather(
        [_choose(config, room, devices.world, on_cpu) if devices.is_main else None]
    )[0]
    if devices.is_main:
        run.save_json(RECORD, {**made_for, **asdict(choice)})
    context.say(choice.sentence())
    return override(config, choice.settings)


def chosen_in_check(
    config: Config, processes: int, card_gib: float | None = None
) -> tuple[Config, dict[str, Choice], list[str]]:
    """The config with what `memory` would choose, of its parts as well; the choices by the part's path; and a sentence
    where "auto" cannot tell. card_gib: the memory of a GPU, for "auto"; None: what is free of the one here."""
    chosen: dict[str, Choice] = {}
    for path, part in _parts(config).items():
        if part.memory is None:
            continue
        free = card_gib if card_gib is not None or part.memory != AUTO else _free_here(part)
        if part.memory == AUTO and free is None:
            return config, {}, [
                'memory="auto" chooses by the GPU that the run begins on, and there is none here: all is counted with '
                "settings as written; --card GIB shows what it chooses on one"
            ]  # fmt: skip
        chosen[path] = _choose(part, room_gib(part.memory, free), processes, part.device == "cpu")
    settings = {
        f"{path}.{field}" if path else field: value
        for path, choice in chosen.items()
        for field, value in choice.settings.items()
    }
    return override(config, settings) if settings else config, chosen, []


def as_trained(run: RunFolder) -> StageConfig:
    """A run's config with the settings that its `memory` chose."""
    config, record = run.config, _record(run)
    return override(config, record.settings) if record and record.memory == _memory(config) else config


def remedy_for_full_memory(run: RunFolder, config: StageConfig) -> str | None:
    """What to change where a run's memory is full with the settings that `memory` chose; None where it chose none."""
    record = _record(run)
    if record is None or _memory(config) is None:
        return None
    # from this size on these settings are planned to fit: below it others are chosen
    size = int((record.planned_gib + RESERVE_GIB) * 100) / 100
    return (
        f"memory={record.memory!r} chose {settings_text(record.settings)}, planned at {record.planned_gib:.2f} GiB; "
        f"write a size below {size:.2f}GiB"
    )


def _memory(config: StageConfig) -> str | None:
    return getattr(config, "memory", None)


def _parts(config: StageConfig) -> dict[str, TrainingConfig]:
    """The config, or those of the runs that it is made of, by path."""
    if isinstance(config, TrainingConfig):
        return {"": config}
    values: dict[str, Any] = {name: getattr(config, name) for name in type(config).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, TrainingConfig)}


def _choose(config: TrainingConfig, room: float, processes: int, on_cpu: bool) -> Choice:
    # with what the launcher says of shards
    laid_out = override(config, {"parallel": layout(config)})
    stage = stage_of(laid_out)
    options = stage.memory_options(laid_out, processes)
    ways = [way for way in options.recomputation if _takes(laid_out, way)]
    if on_cpu:  # whose memory is the host's
        ways = [way for way in ways if way != "offload"]
    return choose(laid_out, replace(options, recomputation=tuple(ways)), stage.memory_plans(laid_out), room)


def _takes(config: TrainingConfig, way: Recomputation) -> bool:
    """Whether the other settings, such as `kernels`, permit a way of recomputation."""
    try:
        override(config, {"gradient_checkpointing": way})
    except UserError:
        return False
    return True


def _free_here(config: TrainingConfig) -> float | None:
    import torch

    from tuner.training.devices import free_gib

    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    return free_gib(torch.device("cuda", 0)) if on_gpu else None


def _kept(run: RunFolder, made_for: dict[str, Any]) -> Choice | None:
    """The choice that a run has begun with, where it was made for the same."""
    values = run.read_json(RECORD) or {}
    same = all(values.get(name) == value for name, value in made_for.items())
    return _record(run) if same and run.has_started else None


def _record(run: RunFolder) -> Choice | None:
    """The choice in a run's folder. Raises UserError where the file holds none."""
    values = run.read_json(RECORD)
    if values is None:
        return None
    try:
        choice = Choice(**{name: values[name] for name in Choice.__dataclass_fields__})
        choice.sentence()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{run.folder / RECORD}.json: no choice of settings; restore it, or remove it to have memory chosen anew"
        ) from error
    return choice
