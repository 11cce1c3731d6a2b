"""Models without weights in place of those that are not at hand, of the same shapes: `tuner check --memory`.

Memory depends on shapes alone. Those of the bases of shipped configs ship with tuner; a run that has not been trained
yet has the shape that its shipped config would give it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuner.config import Model, StageConfig, load_config, override
from tuner.errors import MissingError
from tuner.models.adapters import adapter_settings, is_adapted
from tuner.models.base_record import write_record
from tuner.models.load import load_model
from tuner.models.locate import locate
from tuner.models.shapes import known_shape, write_shape
from tuner.models.tokenizer import save_tokenizer
from tuner.resources import configs_folder
from tuner.stages.check import META
from tuner.stages.model_folder import publish_template
from tuner.stages.registry import stage_of
from tuner.stages.stage import Stage
from tuner.stages.tiny import example_rows

RUNS = "runs/"


def with_shapes(stage: Stage[Any], config: StageConfig, folder: Path) -> tuple[StageConfig, dict[str, str]]:
    """The config with models without weights, and example rows, for those that are not at hand.

    folder: where the models are written. Returns, second, the models' paths, each with where its shape is from. Raises
    MissingError where the shape of one is not known either.
    """
    shapes = Shapes(folder)
    changes: dict[str, Any] = {}
    for field, model in stage.model_fields(config).items():
        path = shapes.folder_of(model)
        if path != model.path:
            # a revision of a folder is refused
            changes |= {f"{field}.path": path, f"{field}.revision": None}
    changes |= example_rows(stage, config)[0]
    return override(config, changes), shapes.origins


class Shapes:
    """Folders of models without weights, each written once: roles of one base must find one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[str, str] = {}
        self.origins: dict[str, str] = {}
        """Path in the config -> where its shape is from, in words."""

    def folder_of(self, model: Model) -> str:
        """The path of a model if it is at hand, else of a folder of its shape. Raises MissingError without one."""
        if model.path not in self._paths:
            self._paths[model.path] = self._find(model)
        return self._paths[model.path]

    def _find(self, model: Model) -> str:
        try:
            location = locate(model, weights=False)
        except MissingError:
            folder = self._folder / f"model_{len(self.origins)}"
            if (shape := known_shape(model.path)) is not None:
                self.origins[model.path] = "its shape as it ships with tuner"
                return str(write_shape(model.path, shape, folder))
            name = model.path.removeprefix(RUNS)
            if name == model.path or not (configs_folder() / f"{name}.py").is_file():
                raise
            self.origins[model.path] = f"the shape that the config {name} would give it"
            self._write_run(name, folder)
            return str(folder)
        self.origins[model.path] = f"the config.json in {location.base_folder}"
        return model.path

    def _write_run(self, name: str, folder: Path) -> None:
        """Write the model that a run of a shipped config would end with, without weights."""
        config: Any = load_config(name)
        stage = stage_of(config)
        trained = stage.trained_model(config)
        path = self.folder_of(trained.model)
        loaded = load_model(
            trained.model.model_copy(update={"path": path, "revision": None}),
            precision=config.precision,
            device=META,
            adapter=trained.adapter,
            freeze=trained.freeze,
            head=trained.head,
        )
        publish_template(loaded, trained.template)
        folder.mkdir(parents=True)
        if is_adapted(loaded.model):
            adapter_settings(loaded.model).save_pretrained(str(folder))
        else:
            loaded.transformer.config.architectures = [type(loaded.transformer).__name__]
            loaded.transformer.config.save_pretrained(str(folder))
        save_tokenizer(loaded.tokenizer, folder)
        write_record(folder, loaded.base, loaded.adapter)
        stage.write_beside(config, folder)
