"""A finished run's model, loaded for evaluation."""

from __future__ import annotations

import gc

import torch

from tuner.config import SingleModelConfig
from tuner.models.load import Head, load_model
from tuner.models.roles import Roles
from tuner.stages.run import Run
from tuner.training.devices import Devices


def load_finished(
    run: Run, config: SingleModelConfig, role: str, head: Head = "language"
) -> tuple[Devices, Roles]:
    """The config's devices, and on them the run's trained model in its one role."""
    devices = Devices.unsharded(config)
    # Quantization and rope are recorded with the saved weights; a revision of a local folder is refused.
    model = config.model.model_copy(
        update={"path": str(run.model_folder), "revision": None, "quantization": None, "rope": None}
    )
    loaded = load_model(model, precision=config.precision, device=devices.device, train=False, head=head)
    return devices, Roles.of(role, loaded, devices.autocast)


def free_memory() -> None:
    """Release the memory of a deleted model before the next is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
