"""What only a GPU can tell: whether results are right on it, how much memory runs need, and how fast they are.

    python benchmarks/gpu/run.py --minutes 8             as many cases as fit, the correctness table first
    python benchmarks/gpu/run.py --minutes 8             and the others in a later call: what is measured is skipped
    python benchmarks/gpu/run.py --only memory.nf4_7b_2k speed.nf4_7b_4k
    python benchmarks/gpu/run.py --dry                   every case in small on a CPU; --device cuda: on the GPU

Each case is a process of its own, with a time limit; one that fails has a row with its error, and the others go on.
Rows are appended to measured.jsonl beside this script as they are measured: a case is done when its last row is there
with this card's name and this state of tuner/. Models are random, made on the device from their shapes; nothing is
downloaded. Exits with 1 where a case failed or a value missed its target. docs/gpu.md has the targets.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("measured.jsonl")
# Set before torch is imported, and inherited by every case: whether there is a GPU is asked without touching it.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}


def main() -> int:
    options = parsed(sys.argv[1:])
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.path[0] = str(ROOT)  # this script's own folder has modules with common names
    if options.child:
        return _child(json.loads(options.child))
    if options.list:
        return _list()
    return _run(options)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; SystemExit with 2 for others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, help="time of this call (default: 8; of a dry run 60)")
    parser.add_argument(
        "--only", nargs="+", metavar="CASE", help="these cases alone, also where they are done"
    )
    parser.add_argument("--dry", action="store_true", help="every case in small, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda, in a dry run cpu")
    parser.add_argument("--rows", type=Path, help=f"file of rows (default: {FILE.name} beside this script)")
    parser.add_argument("--models", type=Path, help="folder of the random models, kept between calls")
    parser.add_argument("--list", action="store_true", help="print the cases, and measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.dry else "cuda")
    options.minutes = options.minutes or (60 if options.dry else 8)
    if options.device == "cpu" and not options.dry:
        parser.error("a CPU is no place for these sizes: write --dry, which runs every case in small")
    return options


def _run(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * options.minutes
    import torch

    from benchmarks.gpu.case import Place
    from benchmarks.gpu.catalog import CASES
    from benchmarks.gpu.rows import Rows, surroundings
    from benchmarks.gpu.runner import Runner, how_to_start, preload

    for name in options.only or ():
        if name not in CASES:
            print(f"there is no case {name!r}; --list prints them", file=sys.stderr)
            return 2
    temporary = Path(tempfile.mkdtemp(prefix="tuner-gpu-"))
    file = options.rows or (temporary / "dry.jsonl" if options.dry else FILE)
    logs = file.parent / f"{file.stem}_logs"
    logs.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    preload(device)
    forks = how_to_start(device, logs / "device.txt")
    if forks is None:
        print("torch sees no GPU here; --dry runs every case in small on the CPU", file=sys.stderr)
        return 2
    here = surroundings(on_gpu=device.type == "cuda", is_dry=options.dry)
    print(f"{here.card}, driver {here.driver}; rows in {file}, what cases print in {logs}", flush=True)
    models = (
        options.models or (temporary if options.dry else Path(tempfile.gettempdir())) / "tuner-gpu-models"
    )
    rows = Rows(file, here)
    runner = Runner(CASES, rows, Place(device, options.dry, models, temporary), logs, deadline, forks)
    left = runner.run(options.only or list(CASES), again=bool(options.only))
    if left:
        print(f"no time was left for {len(left)} cases: {', '.join(left)}")
    bad = [row for row in rows.new if row["ok"] is False or row.get("outcome") == "failed"]
    print(f"{len(bad)} failures and missed targets")
    return int(bool(bad))


def _child(values: dict[str, object]) -> int:
    """As the interpreter of one case."""
    for module in values["first"]:  # type: ignore[attr-defined]
        importlib.import_module(module)
    import torch

    from benchmarks.gpu.case import Place
    from benchmarks.gpu.catalog import CASES
    from benchmarks.gpu.child import measure_into

    work = Path(str(values["work"]))
    earlier = {(case, name): float(value) for case, name, value in values["earlier"]}  # type: ignore[attr-defined]
    device = torch.device(str(values["device"]))
    place = Place(device, bool(values["dry"]), Path(str(values["models"])), work, earlier)
    measure_into(work / "measured.jsonl", CASES[str(values["case"])], place)
    return 0


def _list() -> int:
    from benchmarks.gpu.catalog import CASES

    for case in CASES.values():
        bounds = ", ".join(f"{name} {bound}" for name, bound in case.bounds.items())
        print(f"{case.name:<34} {case.seconds:>4} s  {case.what}{f' ({bounds})' if bounds else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
