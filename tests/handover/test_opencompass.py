"""The config that `tuner eval --opencompass` writes, read by OpenCompass's own reader with OpenCompass's own datasets.

Needs an environment of its own, named by TUNER_OPENCOMPASS_PYTHON: `pip install mmengine-lite packaging`, and
`pip install --no-deps opencompass`, whose pins do not go with tuner's.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tuner.models.tiny import tiny_model_folder
from tuner.stages.opencompass import opencompass_config

pytestmark = pytest.mark.handover

READ = """
import json, sys
from mmengine.config import Config
config = Config.fromfile(sys.argv[1], format_python_code=False)
print(json.dumps({"datasets": [dataset["abbr"] for dataset in config["datasets"]], "models": config["models"]}))
"""


def test_opencompass_reads_the_config(tmp_path: Path):
    name = 'a "model"\n, 模型'
    folder = tiny_model_folder("meta-llama/Llama-3.2-1B", tmp_path / name)
    file = tmp_path / "config.py"
    text = opencompass_config("tuner:tiny", ["gsm8k", "math.math_gen", "IFEval"], [str(folder)])
    file.write_text(text, encoding="utf-8")
    python = os.environ["TUNER_OPENCOMPASS_PYTHON"]
    done = subprocess.run([python, "-c", READ, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout.splitlines()[-1])
    assert config["datasets"] == ["gsm8k", "math", "IFEval"]
    tiny, llama = config["models"]
    assert tiny["type"] == "opencompass.models.HuggingFacewithChatTemplate"
    assert (llama["abbr"], llama["path"]) == (str(folder), str(folder.resolve()))
