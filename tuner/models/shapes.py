"""Shapes of the bases that shipped configs name, for counting memory where the models themselves are not at hand.

`shapes.json` has of each the fields of its config.json that decide memory and what of them a config may change (the
trained length); two names of one shape refer to one another. A real config.json always wins.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuner.models.model_file import FILE as MODEL_FILE
from tuner.models.tiny import tiny_model_folder

_FILE = Path(__file__).with_name("shapes.json")


def known_shape(path: str) -> dict[str, Any] | None:
    """The shape of a hub model, as fields of its config.json; None where none ships with tuner."""
    shapes: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    shape = shapes.get(path)
    return shapes[shape] if isinstance(shape, str) else shape


def write_shape(path: str, shape: dict[str, Any], folder: Path) -> Path:
    """Write a model's folder without weights: a config.json of this shape, and the small tokenizer of its family.

    path: name of the model, which tells the family. Returns the folder.
    """
    tiny_model_folder(path, folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    file = folder / MODEL_FILE
    small = json.loads(file.read_text(encoding="utf-8"))
    tokens = {name: value for name, value in small.items() if name.endswith("_token_id")}
    file.write_text(json.dumps(shape | tokens, indent=2) + "\n", encoding="utf-8")
    return folder
