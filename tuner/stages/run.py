"""A run, as used from Python and Jupyter: its folder, its curves, and chat with its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuner.display.curves import draw_curves
from tuner.stages.registry import stage_of
from tuner.training.run_folder import RunFolder


class Run(RunFolder):
    """A run folder with its curves and its model."""

    def __init__(self, folder: Path | str, model_folder: Path | None = None) -> None:
        """model_folder: of the model to measure, where it is a checkpoint's; None: the one that the run ended with."""
        super().__init__(folder)
        self._model_folder = model_folder

    @property
    def model_folder(self) -> Path:
        return self._model_folder or super().model_folder

    def plot(self) -> Any:
        """Redraw curves.png; returns it as an image for Jupyter, or as its path where IPython is not installed."""
        path = self.draw_curves()
        try:
            from IPython.display import Image
        except ImportError:
            return path
        return Image(filename=str(path))

    def draw_curves(self) -> Path:
        """Write curves.png from the metrics so far; returns its path."""
        path, config = self.folder / "curves.png", self.config
        draw_curves(self.metrics, path, self.folder.name, stage_of(config).figures(config))
        return path

    def chat(self, message: str, *, max_new_tokens: int = 256, temperature: float = 0.0) -> str:
        """The answer of the run's model to one message. Loads the model anew."""
        from tuner.data.conversation import Turn
        from tuner.models.chat import open_chat
        from tuner.stages.run_models import usable_path

        turns = [Turn("user", message)]
        model = open_chat(usable_path(str(self.folder)))
        return "".join(model.answer(turns, max_new_tokens=max_new_tokens, temperature=temperature))


def open_run(folder: Path | str) -> Run:
    """An existing run. Raises UserError where the folder is not a run's."""
    run = Run(folder)
    _ = run.config  # raises where there is none
    return run
