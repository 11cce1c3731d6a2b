"""tuner: from a base model to an aligned one. `import tuner` imports neither torch nor pydantic."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.config import load_config, override
    from tuner.errors import UserError
    from tuner.models.scorer import Scorer
    from tuner.stages.data_view import view_data
    from tuner.stages.run import Run, open_run
    from tuner.stages.run_models import open_scorer
    from tuner.stages.train import train

__version__ = "0.1.0"

_MODULE_OF = {
    "load_config": "tuner.config",
    "override": "tuner.config",
    "train": "tuner.stages.train",
    "view_data": "tuner.stages.data_view",
    "open_run": "tuner.stages.run",
    "open_scorer": "tuner.stages.run_models",
    "Scorer": "tuner.models.scorer",
    "Run": "tuner.stages.run",
    "UserError": "tuner.errors",
}
__all__ = [
    "Run",
    "Scorer",
    "UserError",
    "load_config",
    "open_run",
    "open_scorer",
    "override",
    "train",
    "view_data",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
