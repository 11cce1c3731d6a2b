"""Start-up cost of commands: CPU seconds of tuner's and TRL's, measured together.

    python benchmarks/cli_startup.py [--json]

Medians of 5 rounds in which commands alternate, so that load on the machine affects all of them. CPU seconds (user and
system, children included) rather than wall time, since the limits must hold on shared cores. Exits with 1 if a limit is
exceeded.
"""

import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

ROUNDS = 5
REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class Case:
    """A command of tuner, its limit in CPU seconds, and the corresponding command of TRL."""

    command: tuple[str, ...]
    limit: float
    peer: tuple[str, ...]


CASES = (
    Case(("tuner", "--help"), 0.25, ("trl", "--help")),
    Case(("tuner", "show", "configs/quickstart_sft.py"), 0.5, ("trl", "sft", "--help")),
)


def cpu_seconds(command: tuple[str, ...]) -> float:
    """User and system time of a command, which must succeed."""
    child = os.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        null_device = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_device, 1)
        os.dup2(null_device, 2)
        os.execv(SCRIPTS / command[0], [str(SCRIPTS / command[0]), *command[1:]])
    # Of this child alone: RUSAGE_CHILDREN would add up all commands measured before.
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


def measure() -> dict[tuple[str, ...], float]:
    """Median CPU seconds by command; an uncounted first round fills the bytecode and disk caches."""
    commands = [command for case in CASES for command in (case.command, case.peer)]
    rounds = [[cpu_seconds(command) for command in commands] for _ in range(ROUNDS + 1)][1:]
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return dict(zip(commands, medians, strict=True))


def main() -> None:
    missing = [name for name in ("tuner", "trl") if not (SCRIPTS / name).is_file()]
    if missing:
        sys.exit(f"{SCRIPTS} has no {' and no '.join(missing)}: install tuner and TRL there first")
    seconds = measure()
    rows = [
        {
            "command": " ".join(case.command),
            "seconds": round(seconds[case.command], 3),
            "limit": case.limit,
            "peer": " ".join(case.peer),
            "peer_seconds": round(seconds[case.peer], 3),
            "ratio": round(seconds[case.command] / seconds[case.peer], 3),
            "within": seconds[case.command] <= case.limit,
        }
        for case in CASES
    ]
    if "--json" in sys.argv[1:]:
        print(json.dumps(rows, indent=2))
    else:
        print(f"{'command':<42}{'CPU s':>7}{'limit':>7}   {'peer':<16}{'CPU s':>7}{'ratio':>7}")
        for row in rows:
            verdict = "" if row["within"] else "   LIMIT EXCEEDED"
            print(
                f"{row['command']:<42}{row['seconds']:>7.3f}{row['limit']:>7.2f}   "
                f"{row['peer']:<16}{row['peer_seconds']:>7.3f}{row['ratio']:>7.2f}{verdict}"
            )
    sys.exit(0 if all(row["within"] for row in rows) else 1)


if __name__ == "__main__":
    main()
