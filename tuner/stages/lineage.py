"""The models that a run comes from: its base, the runs in between, and of a run in rounds each round's policy."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.config import Model, StageConfig
from tuner.errors import UserError
from tuner.models.arithmetic import Precision
from tuner.models.locate import locate
from tuner.stages.registry import stage_of
from tuner.stages.run import Run
from tuner.stages.run_models import is_run, run_folder_of, usable_path


@dataclass(frozen=True)
class Generation:
    """A model in a line of models, each trained from the one before."""

    name: str
    """Name in tables."""
    model: Model
    precision: Precision
    config: StageConfig | None = None
    """Of the run that it is the model of; None for a model that no run here trained."""


def lineage(path: str, *, trust: bool = False) -> list[Generation]:
    """A model with all it was trained from, oldest first; path: a run, a checkpoint, a model folder or a hub name.

    trust: let the models run Python code of their own. Raises UserError where one of them is missing, or the run is a
    reward model's.
    """
    if not is_run(run_folder_of(path)):
        return [_outsider(Model(path=usable_path(path, trust=trust)), path, trust)]
    config = Run(run_folder_of(path)).config
    stage = stage_of(config)
    start = stage.trained_model(config)
    if start.head == "score":
        raise UserError(
            f"{path}: a reward model answers no tasks; `tuner eval {path}` measures it on its rows"
        )
    precision = stage.training_config(config).precision
    if is_run(run_folder_of(start.model.path)):
        line = lineage(start.model.path, trust=trust)
    else:
        line = [_outsider(start.model, start.model.path, trust, precision)]
    names = stage.round_models(run_folder_of(path), config) or {path: path}
    return line + [
        Generation(name, Model(path=usable_path(str(folder), trust=trust)), precision, config)
        for name, folder in names.items()
    ]


def _outsider(model: Model, name: str, trust: bool, precision: Precision | None = None) -> Generation:
    """precision: that of the run which begins with a complete model; an adapter has its own."""
    model = model.model_copy(update={"trust_remote_code": trust})
    location = locate(model, weights=False)
    if location.has_score:
        raise UserError(f"{name}: a reward model answers no tasks; name a language model")
    if precision is None or location.adapter_folder is not None:
        precision = location.precision
    return Generation(name, model, precision)
