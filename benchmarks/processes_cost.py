"""Cost of a second process: CPU seconds of SFT by two processes against one, for the same work; tuner and TRL.

    python benchmarks/processes_cost.py [--rounds 3] [--without-trl] [--write]

The cases of benchmarks/sft_cost.py; two processes exchange gradients by gloo. CPU seconds of all processes together, as
the difference between a short and a long run over the tokens trained in between, so that imports, loading and saving do
not count; one thread a process; medians of rounds in which one and two alternate. Exits with 1 if two tuner processes
take more than 1.05 × one.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from report import report, verdict
from sft_cost import make_cases, quiet, run_trl, silence, train_tuner

LIMIT = 1.05
CASES = ("nano, LoRA", "nano, full", "tiny, LoRA")
STEPS = {"nano": (2, 74), "tiny": (1, 9)}
"""Of the two runs whose difference is measured."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/processes_cost.md")
    parser.add_argument(
        "--work", nargs=4, metavar=("TRAINER", "CASE", "STEPS", "FOLDER"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.work:
        trainer, case, steps, folder = options.work
        work(trainer, case, int(steps), Path(folder))
        return 0
    rows = []
    for case in CASES:
        row, ratio = [case], measured("tuner", case, options.rounds)
        row += [*cells(*ratio), f"≤ {LIMIT:.2f}", verdict(ratio[2], LIMIT)]
        rows.append(row if options.without_trl else [*row, *cells(*measured("trl", case, options.rounds))])
    steps = ", ".join(f"{model} {short} and {long} steps" for model, (short, long) in STEPS.items())
    columns = ["", "one process", "two", "two/one", "limit", "within"]
    report(
        "processes_cost",
        "SFT by several processes: CPU µs of all of them per trained token",
        columns if options.without_trl else [*columns, "TRL, one", "two", "two/one"],
        rows,
        notes=[
            f"Differences between a short and a long run ({steps}) of 4,096 tokens a step in passes of 2,048, fp32; "
            f"medians of {options.rounds} rounds."
        ],
        packages=("torch", "transformers", "peft", "trl"),
        write=options.write,
    )
    return int(any(row[5] == "NO" for row in rows))


def cells(single: float, double: float, ratio: float) -> list[str]:
    return [f"{single:.1f}", f"{double:.1f}", f"{ratio:.3f}"]


def measured(trainer: str, case: str, rounds: int) -> tuple[float, float, float]:
    """CPU microseconds per trained token by one process and by two, and their ratio: medians of the rounds."""
    costs = [(slope(trainer, case, 1), slope(trainer, case, 2)) for _ in range(rounds)]
    single, double = (statistics.median(column) for column in zip(*costs, strict=True))
    return single, double, statistics.median(two / alone for alone, two in costs)


def slope(trainer: str, case: str, processes: int) -> float:
    short, long = (run(trainer, case, processes, steps) for steps in STEPS[case.split(",")[0]])
    return (long[0] - short[0]) / (long[1] - short[1]) * 1e6


def run(trainer: str, case: str, processes: int, steps: int) -> tuple[float, float]:
    """CPU seconds of a run, of all its processes, and the tokens they trained on."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(launcher if processes > 1 else ())]
        before = _children()
        subprocess.run(
            [*command, __file__, "--work", trainer, case, str(steps), folder], check=True, capture_output=True
        )
        seconds = _children() - before
        return seconds, sum(json.loads(file.read_text()) for file in Path(folder).glob("tokens_*.json"))


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def work(trainer: str, name: str, steps: int, folder: Path) -> None:
    """A process's part of a run; it writes down how many tokens it trained on."""
    from accelerate import PartialState

    silence()
    state = PartialState(cpu=True)
    with quiet():
        with state.main_process_first():  # all write the same model and rows: one after the other
            case = next(case for case in make_cases(folder) if case.name == name)
        state.wait_for_everyone()
        if trainer == "tuner":
            train_tuner(case, steps, folder)
            tokens = case.tokens(steps) / state.num_processes
        else:
            tokens = run_trl(case, steps)  # those that this process has trained on
    (folder / f"tokens_{state.process_index}.json").write_text(json.dumps(tokens))


if __name__ == "__main__":
    sys.exit(main())
