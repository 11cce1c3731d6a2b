"""A model of fewer layers, for tests of what does not depend on their number: a run takes a fraction of the time."""

import atexit
import json
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file

from tuner.resources import locate


@cache
def shallow(layers: int) -> str:
    """The path of such a model, which is written once per process and is gone with it.

    Two layers are enough to tell whether layers are mixed up, held, gathered or computed again each on its own.
    """
    folder = Path(tempfile.mkdtemp(prefix="tuner-shallow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(first_layers(folder / f"tiny_of_{layers}", layers))


def first_layers(folder: Path, layers: int) -> Path:
    """Write the embedded model with its first layers alone. It still learns how answers look, and to end them."""
    shutil.copytree(locate("tuner:tiny"), folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if _layer(name) < layers}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def _layer(name: str) -> int:
    """Of a weight; -1 for those outside the layers."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return int(layer[1]) if layer else -1
