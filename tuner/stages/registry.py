"""From a config to its stage. A stage is imported when one of its configs is run, and no other."""

from __future__ import annotations

import importlib

from tuner.config import StageConfig
from tuner.stages.stage import Stage


def stage_of(config: StageConfig) -> Stage:
    """The stage that runs configs of this class: `STAGE` of the module that the class names."""
    return importlib.import_module(config.implementation).STAGE
