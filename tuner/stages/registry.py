"""From a config to its stage. Only the stage that is run is imported, with the libraries it needs."""

from __future__ import annotations

import importlib
from typing import Any

from tuner.config import StageConfig
from tuner.stages.stage import Stage


def stage_of(config: StageConfig) -> Stage[Any]:
    """The stage that runs configs of this class: `STAGE` of the module that `implementation` names."""
    return importlib.import_module(config.implementation).STAGE
