"""Follow docs/handing_over.md from its first command to its last: `make demo-handover`.

    python scripts/demo_handover.py [--model FOLDER] [--write]

Runs the page's bash blocks in their order, in a new folder, as a reader of the page would, and prints what they print.
Ends with an error where a command fails, where our engine, llama.cpp and the openai client do not get the same answer,
or where training does not raise the task's score. With --model the base is not fetched but taken from FOLDER, and in a
--folder that an earlier call has left, finished blocks are not run again. With --write, the outputs and what they cost
are written into the page, each below its block.

Needs llama.cpp (`make handover`) and lm-evaluation-harness (`pip install '.[eval]'`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo import DOCS, ROOT, provenance, replace_part

from tuner.models.tool_python import DEFAULT_PYTHON

PAGE = DOCS / "handing_over.md"
BLOCK = re.compile(r"^## (.*?)$|^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BEGIN, END = "<!-- {name}: written by scripts/demo_handover.py -->\n", "<!-- end -->"
ANSWER = re.compile(r'^\{"team".*\}$', re.MULTILINE)
"""A line that is an answer of the trained model, and none of the rows it was trained on."""
SCORE = re.compile(r"^\S.*?\s(\d\.\d{3}) \[", re.MULTILINE)
"""A model's score in the table of `tuner eval --tasks`."""
BASE, PORT = "smollm2", "8000"
"""What the page calls the base's folder, and where it serves."""
LINKED = ("scripts", "configs", DEFAULT_PYTHON.split("/")[0])
"""What the page names of the repository."""
LONGEST = 24
"""Lines of an output that the page shows at most."""
RECORD = "done.json"
"""In the folder: the blocks that have been run."""


@dataclass(frozen=True)
class Step:
    """A bash block of the page, by the heading above it."""

    name: str
    commands: str

    @property
    def missing(self) -> str | None:
        """What it needs and is not installed."""
        if DEFAULT_PYTHON in self.commands and not (ROOT / DEFAULT_PYTHON).is_file():
            return f"{DEFAULT_PYTHON} (make handover)"
        if "--tasks" in self.commands and importlib.util.find_spec("lm_eval") is None:
            return "lm-evaluation-harness (pip install '.[eval]')"
        return None


@dataclass(frozen=True)
class Done:
    """A step that was run."""

    step: Step
    output: str
    cpu_seconds: float

    @property
    def answers(self) -> list[str]:
        """Answers of the trained model in its output."""
        return ANSWER.findall(self.output)


def steps(page: Path = PAGE) -> list[Step]:
    """The page's bash blocks in order; a heading has one at most."""
    heading, read = "", list[Step]()
    for title, commands in BLOCK.findall(page.read_text(encoding="utf-8")):
        heading = title or heading
        if commands:
            read.append(Step(heading, commands))
    assert len({step.name for step in read}) == len(read), "a heading has two bash blocks"
    return read


def prepare(folder: Path, model: Path | None) -> None:
    """Make a folder the place of the page's commands. model: a base in place of the one that the page fetches."""
    folder.mkdir(parents=True, exist_ok=True)
    links = {name: ROOT / name for name in LINKED} | ({} if model is None else {BASE: model.absolute()})
    for name, target in links.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target)


def follow(page: Sequence[Step], folder: Path) -> Iterator[Done]:
    """Run the page's blocks in a prepared folder, but for those that an earlier call has run there."""
    record = folder / RECORD
    earlier = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for step in page:
        if step.commands not in earlier:
            finished = run(step, folder)
            earlier[step.commands] = [finished.output, finished.cpu_seconds]
            record.write_text(json.dumps(earlier), encoding="utf-8")
        yield Done(step, *earlier[step.commands])


def run(step: Step, folder: Path) -> Done:
    """Run a step's commands; ends the program where one fails."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "COLUMNS": "110",  # of tables
    }
    cpu_before = _cpu_seconds()
    finished = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step.commands.replace(PORT, _free_port())],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if finished.returncode:
        sys.exit(f"{step.name}:\n{step.commands}\n{finished.stdout}\n{finished.stderr[-4000:]}")
    return Done(step, finished.stdout, _cpu_seconds() - cpu_before)


def check(done: Sequence[Done]) -> None:
    """End the program where tools answer otherwise than we do, or the task's score does not rise."""
    answers = {finished.step.name: finished.answers for finished in done if finished.answers}
    if len({answer for each in answers.values() for answer in each}) != 1:
        sys.exit(f"the answers differ: {answers}")
    scores = [
        float(score)
        for finished in done
        if "--tasks" in finished.step.commands
        for score in SCORE.findall(finished.output)
    ]
    if len(scores) != 2 or scores[0] >= scores[1]:
        sys.exit(f"the task's scores before and after training do not rise: {scores}")


def write(done: Sequence[Done], command: str) -> None:
    """Put outputs below their blocks, and costs below all."""
    for finished in done:
        lines = finished.output.replace(PORT, "8000").rstrip().splitlines()
        if len(lines) > LONGEST:
            lines = [*lines[: LONGEST // 2], "…", *lines[-LONGEST // 2 :]]
        text = "\n".join(line.rstrip() for line in lines)
        replace_part(PAGE, BEGIN.format(name=finished.step.name), END, f"```text\n{text}\n```\n")
    # not seconds of a clock, which tell of what else the machine was doing
    rows = [f"| {finished.step.name} | {finished.cpu_seconds:.0f} |" for finished in done]
    total = f"| all | {sum(finished.cpu_seconds for finished in done):.0f} |"
    table = "\n".join(["| step | CPU seconds |", "| --- | --- |", *rows, total])
    source = f"{provenance(command)} {_others()}"
    replace_part(PAGE, BEGIN.format(name="costs"), END, f"{table}\n\n{source}\n")


def _others() -> str:
    """The CPU, and versions of what answered beside tuner."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    question = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    llama = subprocess.run(
        [ROOT / DEFAULT_PYTHON, "-c", question], capture_output=True, text=True, check=True
    ).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("peft", "openai", "lm-eval")}
    said = ", ".join(f"{name} {version}" for name, version in {**versions, "llama-cpp-python": llama}.items())
    return f"{said}; {os.cpu_count()} cores of {names[0] if names else 'a CPU'}."


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument(
        "--model", type=Path, help="folder of SmolLM2-135M-Instruct, in place of fetching it"
    )
    options.add_argument(
        "--folder", type=Path, help="new folder to work in; default: one that goes afterwards"
    )
    options.add_argument("--write", action="store_true", help="write outputs and costs into the page")
    values = options.parse_args()
    page = steps()
    if missing := {step.missing for step in page} - {None}:
        sys.exit(f"demo_handover: not installed: {', '.join(sorted(map(str, missing)))}")
    folder = values.folder or Path(tempfile.mkdtemp(prefix="handing-over-"))
    try:
        prepare(folder, values.model)
        done = []
        for finished in follow(page, folder):
            done.append(finished)
            print(f"\n## {finished.step.name}\n\n{finished.step.commands}\n{finished.output}", flush=True)
            print(f"({finished.cpu_seconds:.0f} CPU seconds)", flush=True)
        check(done)
        if values.write:
            write(done, "make demo-handover")
    finally:
        if values.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
