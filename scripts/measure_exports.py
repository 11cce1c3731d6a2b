"""How often llama.cpp answers a model's GGUF files as tuner answers the model: greedy texts, equal or not.

    .venv-handover made by `make handover`; then
    python scripts/measure_exports.py RUN_OR_MODEL [--prompts 20] [--tokens 24]

Prints a row of docs/exporting.md's table for each kind of file.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

from tuner.cli.main import app
from tuner.data.conversation import Turn
from tuner.models.chat import open_chat
from tuner.models.tool_python import DEFAULT_PYTHON, python_with

KINDS = ("bf16", "f16", "q8_0", "q4_k_m")
OPEN = (
    "Name three colors.",
    "What is a broom?",
    "Say hello in French.",
    "Why is the sky blue?",
    "Write a short poem.",
)
ASK = Path(__file__).parent.parent / "tests" / "handover" / "ask_llama_cpp.py"


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("model")
    options.add_argument("--prompts", type=int, default=20)
    options.add_argument("--tokens", type=int, default=24)
    values = options.parse_args()
    sums = [f"What is {number} + {number * 7 % 23}?" for number in range(3, 100)]
    # half sums, half open questions as far as there are some
    prompts = [*OPEN[: values.prompts // 2], *sums][: values.prompts]
    chat = open_chat(values.model)
    here = ["".join(chat.answer([Turn("user", prompt)], max_new_tokens=values.tokens)) for prompt in prompts]
    del chat
    python = python_with("llama-cpp-python", "llama_cpp", f"asking llama.cpp ({DEFAULT_PYTHON})")
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            output = Path(folder, kind)
            quantize = [] if kind == "bf16" else ["--quantize", kind]
            begin = time.monotonic()
            app(["export", values.model, str(output), "--format", "gguf", *quantize], standalone_mode=False)
            seconds = time.monotonic() - begin
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            question = {"model": str(output / "model.gguf"), "chats": chats, "new": values.tokens}
            asked = subprocess.run(
                [python, str(ASK)], input=json.dumps([question]), capture_output=True, text=True, check=True
            )
            same = sum(a == b for a, b in zip(here, json.loads(asked.stdout)[0]["chats"], strict=True))
            size = (output / "model.gguf").stat().st_size / 1e6
            print(f"| {kind} | {size:,.1f} MB | {same} of {len(prompts)} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
