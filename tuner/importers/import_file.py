"""From a config file of another trainer to the text of a config of tuner, and the report of what became of its keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tuner import config as classes
from tuner.config.stage_config import StageConfig
from tuner.config.validation_errors import explain
from tuner.errors import UserError
from tuner.importers.config_text import config_text
from tuner.importers.part import Part
from tuner.importers.recipe import Recipe
from tuner.importers.report import Report
from tuner.importers.stages import stage_part

_TITLES = {"sft": "SFT", "text": "continued pre-training", "reward": "reward model"}


@dataclass(frozen=True)
class Imported:
    """A config of another trainer as one of tuner."""

    tool: str
    text: str
    """The config file."""
    templates: dict[str, str]
    """Path -> text of the chat template that belongs beside it."""
    config: StageConfig
    report: Report


def import_config(file: Path, output: Path, devices: int = 1) -> Imported:
    """Read a config of XTuner 0.2, LLaMA-Factory or Axolotl as one of tuner, to be written to `output`.

    devices: those that the other trainer was run on, which its batch size is multiplied by. Raises UserError, with
    `file:line` where there is one, for what is no such config, and for what trains what tuner does not.
    """
    if file.suffix == ".py":
        recipe = _read_python(file, devices)
    elif file.suffix in (".yaml", ".yml", ".json"):
        recipe = _read_yaml(file, devices)
    else:
        raise UserError(
            f"{file}: a config of XTuner 0.2 ends in .py, one of LLaMA-Factory or Axolotl in .yaml; name it"
        )
    _place_templates(recipe, output)
    part = stage_part(recipe)
    config = _validated(part, file, output)
    stage = _TITLES.get(recipe.stage, part.name)
    model = recipe.model.fields.get("path", "")
    docstring = f"{stage[0].upper()}{stage[1:]}: {model}.\n\nImported from {recipe.tool}: {recipe.file}\n"
    text = config_text(part, docstring, recipe.functions.values())
    return Imported(recipe.tool, text, recipe.templates, config, recipe.report)


def _read_python(file: Path, devices: int) -> Recipe:
    from tuner.importers.python_syntax import read_python
    from tuner.importers.xtuner import read_xtuner

    names, unused = read_python(file)
    if not {"model", "train_dataloader", "training_args"} & set(names):
        raise UserError(f"{file}: no config of XTuner 0.2: it defines no `model` and no `train_dataloader`")
    recipe = Recipe("XTuner 0.2", file.name, Report())
    read_xtuner(names, unused, file, recipe, devices)
    return recipe


def _read_yaml(file: Path, devices: int) -> Recipe:
    from tuner.importers.yaml_file import read_yaml

    block = read_yaml(file)
    if "base_model" in block:
        from tuner.importers.axolotl import read_axolotl

        recipe = Recipe("Axolotl", file.name, Report())
        read_axolotl(block, file, recipe, devices)
    elif "model_name_or_path" in block:
        from tuner.importers.llama_factory import read_llama_factory

        recipe = Recipe("LLaMA-Factory", file.name, Report())
        read_llama_factory(block, file, recipe, devices)
    else:
        raise UserError(
            f"{file}: no config that is known: LLaMA-Factory's have a model_name_or_path, Axolotl's a base_model"
        )
    return recipe


def _place_templates(recipe: Recipe, output: Path) -> None:
    """Name templates as they are found from the working directory: beside the config."""
    if recipe.data.get("template") in recipe.templates:
        file = output.with_suffix(".jinja")
        recipe.templates = {str(file): recipe.templates[recipe.data["template"]]}
        recipe.data["template"] = str(file)


def _validated(part: Part, file: Path, output: Path) -> StageConfig:
    try:
        config = part.build(str(output))
    except ValidationError as error:
        cls = getattr(classes, error.title)  # of the part that is invalid
        where = "" if error.title == part.name else f"{error.title}."
        raise UserError(f"{file}: cannot be carried as it is: {explain(error, cls, where)}") from error
    assert isinstance(config, StageConfig)
    return config
