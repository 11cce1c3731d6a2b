"""How often llama.cpp answers a model's GGUF files as tuner answers the model: greedy texts, equal or not.

    .venv-handover made by `make handover`; then
    python scripts/measure_exports.py RUN_OR_MODEL [--prompts 20] [--tokens 24] [--kinds bf16 q8_0] [--write]

Prints a table of the kinds of files. With --write it goes to docs/exporting.md, as the table of
SmolLM2-135M-Instruct: RUN_OR_MODEL is then the folder that scripts/fetch_smollm2.py has made.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from demo import DOCS, provenance, replace_part

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
PAGE = DOCS / "exporting.md"
BEGIN, END = "<!-- SmolLM2: written by scripts/measure_exports.py -->\n", "<!-- end -->"
ASK = Path(__file__).parent.parent / "tests" / "handover" / "ask_llama_cpp.py"


def rows(model: str, kinds: Sequence[str], num_prompts: int, tokens: int) -> Iterator[str]:
    """A row of the table for each kind of file."""
    sums = [f"What is {number} + {number * 7 % 23}?" for number in range(3, 100)]
    # half sums, half open questions as far as there are some
    prompts = [*OPEN[: num_prompts // 2], *sums][:num_prompts]
    chat = open_chat(model)
    here = ["".join(chat.answer([Turn("user", prompt)], max_new_tokens=tokens)) for prompt in prompts]
    del chat
    python = python_with("llama-cpp-python", "llama_cpp", f"asking llama.cpp ({DEFAULT_PYTHON})")
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            output = Path(folder, kind)
            quantize = [] if kind == "bf16" else ["--quantize", kind]
            begin = time.monotonic()
            app(["export", model, str(output), "--format", "gguf", *quantize], standalone_mode=False)
            seconds = time.monotonic() - begin
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            question = {"model": str(output / "model.gguf"), "chats": chats, "new": tokens}
            asked = subprocess.run(
                [python, str(ASK)], input=json.dumps([question]), capture_output=True, text=True, check=True
            )
            same = sum(a == b for a, b in zip(here, json.loads(asked.stdout)[0]["chats"], strict=True))
            size = (output / "model.gguf").stat().st_size / 1e6
            row = f"| {kind} | {size:,.1f} MB | {same} of {num_prompts} |"
            print(f"{row} ({seconds:.0f} s to export)", flush=True)
            yield row


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("model")
    options.add_argument("--prompts", type=int, default=20)
    options.add_argument("--tokens", type=int, default=24)
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options.add_argument("--write", action="store_true")
    values = options.parse_args()
    measured = list(rows(values.model, values.kinds, values.prompts, values.tokens))
    table = "\n".join(["| file | size | the same greedy text |", "| --- | --- | --- |", *measured])
    print(table)
    if values.write:
        source = provenance("python scripts/measure_exports.py FOLDER --write")
        replace_part(PAGE, BEGIN, END, f"{table}\n\n{source}\n")


if __name__ == "__main__":
    main()
