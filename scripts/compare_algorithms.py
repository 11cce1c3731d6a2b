"""PPO, GRPO and RLOO on the quickstart's lesson, by gold score against CPU seconds: the table and curves of docs.

    python scripts/compare_algorithms.py [--seeds 0 1 2] [--precision fp32] [--runs FOLDER] [--write]

One SFT run and one reward model (seed 0); from them each algorithm is trained with every seed. Gold is the share of 120
held-out sums answered rightly in the manner asked for, at temperature 1, by the rule in configs/quickstart_ppo.py. CPU
seconds are the process's, from the first step on, evaluations included, on one thread. With --runs what is finished
there is used again; a run that was interrupted starts over, for its clock would not know what was spent before. With
--write the page and its picture go to docs/.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from demo import provenance

import tuner
from tuner.config import load_config, override

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "quickstart_algorithms"
ALGORITHMS = ("ppo", "grpo", "rloo")
COLORS = {"ppo": "#0072B2", "grpo": "#D55E00", "rloo": "#009E73"}


@dataclass
class GoldClock:
    """A watcher that notes the gold score of each evaluation and the CPU seconds spent until then."""

    points: list[tuple[float, float]] = field(default_factory=list)

    def begin(self, run_folder: Path, config: Any, first_step: int, total_steps: int) -> None:
        # CPU time, so that other processes on the machine do not change the comparison
        self.start = time.process_time()

    def step(self, record: dict[str, Any]) -> None:
        if "eval_gold" in record:
            self.points.append((time.process_time() - self.start, record["eval_gold"]))

    def samples(self, step: int, samples: Any) -> None: ...

    def message(self, text: str) -> None: ...

    def report(self, tables: Any) -> None: ...

    def end(self, outcome: str) -> None: ...


@dataclass(frozen=True)
class Trial:
    """One algorithm trained with one seed."""

    algorithm: str
    seed: int
    before: float
    """Gold of the SFT policy."""
    points: list[tuple[float, float]]
    """(CPU seconds, gold) of every evaluation."""
    kl: float
    steps: int

    def gold_at(self, seconds: float) -> float:
        """Gold of the last evaluation within so many CPU seconds; the SFT policy's before the first."""
        return next((gold for spent, gold in reversed(self.points) if spent <= seconds), self.before)

    @property
    def seconds(self) -> float:
        return self.points[-1][0]


def train(algorithm: str, seed: int, runs: Path, changes: dict[str, Any]) -> Trial:
    """Train one algorithm, or read what an earlier call has measured."""
    saved = runs / f"{algorithm}_{seed}.trial.json"
    if saved.is_file():
        return Trial(**json.loads(saved.read_text(encoding="utf-8")))
    name = f"{algorithm}_{seed}"
    shutil.rmtree(runs / name, ignore_errors=True)
    config = override(
        load_config(f"configs/quickstart_{algorithm}.py"), changes | {"seed": seed, "name": name}
    )
    clock = GoldClock()
    run = tuner.train(config, runs=runs, watchers=[clock])
    results = run.results
    assert results is not None
    trial = Trial(algorithm, seed, results["gold"]["before"], clock.points, results["kl"], len(run.metrics))
    saved.write_text(json.dumps(asdict(trial)), encoding="utf-8")
    return trial


def page(trials: Sequence[Trial], command: str) -> str:
    """The page of docs: gold at equal CPU seconds, by seed and algorithm."""
    limit = min(trial.seconds for trial in trials)
    shares = (0.25, 0.5, 1.0)
    head = " | ".join(f"gold at {limit * share:.0f} s" for share in shares)
    lines = [
        "# PPO, GRPO and RLOO at equal CPU seconds",
        "",
        "The quickstart's lesson, to answer sums politely, by three algorithms from one SFT policy and one reward",
        "model. Gold is the share of 120 held-out sums answered correctly, in the requested manner, at temperature 1,",
        "by the rule in `configs/quickstart_ppo.py`. CPU seconds are counted from the first step on, with evaluations;",
        "gold at a time is that of the last evaluation until then. The last column of gold is where the shortest run",
        f"ended: {limit:.0f} s.",
        "",
        f"| algorithm | seed | gold of the SFT policy | {head} | KL | steps | CPU seconds |",
        f"| --- | --- | --- |{' --- |' * (len(shares) + 3)}",
    ]
    for trial in sorted(trials, key=lambda trial: (ALGORITHMS.index(trial.algorithm), trial.seed)):
        golds = " | ".join(f"{trial.gold_at(limit * share):.3f}" for share in shares)
        lines.append(
            f"| {trial.algorithm.upper()} | {trial.seed} | {trial.before:.3f} | {golds} | {trial.kl:.2f} "
            f"| {trial.steps} | {trial.seconds:.0f} |"
        )
    return "\n".join(
        [*lines, "", f"![Gold against CPU seconds]({PAGE.name}.png)", "", provenance(command), ""]
    )


def draw(trials: Sequence[Trial], file: Path) -> None:
    """Gold against CPU seconds, a line for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for trial in trials:
        label = trial.algorithm.upper() if trial.seed == trials[0].seed else None
        seconds, golds = zip((0.0, trial.before), *trial.points, strict=True)
        axes.plot(seconds, golds, color=COLORS[trial.algorithm], label=label, linewidth=1.6, marker=".")
    axes.set_xlabel("CPU seconds")
    axes.set_ylabel("gold score, held out")
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E8E8E8")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--runs", type=Path, help="folder to keep the runs in, and to go on with those there")
    parser.add_argument("--write", action="store_true", help="keep the page and picture in docs/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = arguments.runs or Path(folder)
        starts = {
            name: str(tuner.train(load_config(f"configs/{name}.py"), runs=runs).folder)
            for name in ("quickstart_sft", "quickstart_reward")
        }
        changes = {
            "precision": arguments.precision,
            "policy.path": starts["quickstart_sft"],
            "reward.path": starts["quickstart_reward"],
            "evaluation.samples": 0,
        }
        trials = [
            train(algorithm, seed, runs, changes) for seed in arguments.seeds for algorithm in ALGORITHMS
        ]
    seeds = " ".join(str(seed) for seed in arguments.seeds)
    command = (
        f"python scripts/compare_algorithms.py --seeds {seeds} --precision {arguments.precision} --write"
    )
    text = page(trials, command)
    sys.stdout.write(text)
    if arguments.write:
        PAGE.with_suffix(".md").write_text(text, encoding="utf-8")
        draw(trials, PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
