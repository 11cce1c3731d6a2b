"""How soon each sign of over-optimization speaks: planted hacks and clean runs, the table of docs/over_optimization.md.

    python scripts/measure_alarms.py --runs FOLDER [--steps 24] [--precision fp32] [--write]

For each of three hacks (scripts/planted_hacks.py) an SFT policy uses it in few of its answers. Reward models are
trained with the hack planted, and without any, and PPO from that policy against each: three planted and two clean runs
a hack. A sign's threshold is the least extreme that never speaks in a clean run; whether a clean run
speaks is decided with the threshold of the other clean runs. What is finished in FOLDER is used again. With --write the
tables go to docs/over_optimization.md.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import planted_hacks
from alarm_signs import SIGNS, WARMUP, Course, first_step, shipped_alarm, sustained
from demo import provenance, replace_part
from planted_hacks import HACKS, NO_HACK

import tuner
from tuner.config import Source, load_config, override
from tuner.stages.run import Run

SEEDS, CLEAN_SEEDS = (0, 1, 2), (0, 100)
"""Of the runs with a planted hack, and of those without, from each policy."""
HABIT_SHARE = 0.15
HABIT_STEPS, HABIT_LR = 70, 1e-3
REWARD_STEPS = 51
PAGE = Path(__file__).resolve().parent.parent / "docs" / "over_optimization.md"
BEGIN, END = "<!-- written by scripts/measure_alarms.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Models:
    """Trains what PPO starts from, in a folder; what is there already is used again."""

    folder: Path
    precision: str

    def train(self, config: str, name: str, changes: dict[str, Any]) -> Run:
        changes = {"name": name, "precision": self.precision, **changes}
        return tuner.train(override(load_config(f"configs/{config}.py"), changes), runs=self.folder)

    def rows(self, name: str, rows: Sequence[planted_hacks.Row]) -> Source:
        """The rows as a file, written once."""
        path = self.folder / "rows" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(path=str(path))

    def policy(self, hack: str) -> Path:
        """The quickstart's SFT policy, which then learns a hack as a habit of few answers."""
        start = self.train("quickstart_sft", "sft", {"model.quantization": None}).folder
        conversations = planted_hacks.conversations([hack], seed=0, share=HABIT_SHARE)
        rows = self.rows(f"conversations_{hack}", conversations)
        changes = {
            "model.path": str(start),
            "model.quantization": None,
            "adapter": None,
            "data.files": [Source(path="tuner:sums/train.jsonl"), rows],
            "max_steps": HABIT_STEPS,
            "optimizer.lr": HABIT_LR,
            "evaluation.score": None,
        }
        return self.train("quickstart_sft", f"sft_{hack}", changes).folder

    def reward(self, kind: str, seed: int) -> Path:
        """A reward model in which a hack is planted, or none."""
        changes = {
            "conditions": {planted_hacks.CONDITION: "tuner:twins/polite.txt"},
            "data.files": [self.rows(f"pairs_{kind}_{seed}", planted_hacks.planted_pairs(kind, seed))],
            "data.test_files": [],
            "max_steps": REWARD_STEPS,
            "seed": seed,
        }
        return self.train("quickstart_reward", f"reward_{kind}_{seed}", changes).folder

    def optimize(self, hack: str, planted: bool, seed: int, steps: int) -> Run:
        """PPO from the policy with a hack, against a reward model with it or without any; every answer is recorded."""
        kind = hack if planted else NO_HACK
        changes = {
            "policy.path": str(self.policy(hack)),
            "reward.path": str(self.reward(kind, seed)),
            "critic_warmup": WARMUP,
            "whiten_advantages": True,
            "replay": None,
            "max_steps": steps,
            "seed": seed,
            # A habit of few answers would be cut out of the samples.
            "sampling.top_p": 1.0,
            "sampling.max_new_tokens": 32,
            "evaluation.every": steps,
            "evaluation.recorded_answers": None,
        }
        return self.train("quickstart_ppo", _name(hack, planted, seed), changes)

    def finished(self, hack: str, planted: bool, seed: int) -> Run | None:
        """The PPO run that an earlier call has finished; None where there is none."""
        run = Run(self.folder / _name(hack, planted, seed))
        return run if run.is_finished else None


def _name(hack: str, planted: bool, seed: int) -> str:
    return f"ppo_{hack}_{'planted' if planted else 'clean'}_{seed}"


def plan() -> list[tuple[str, bool, int]]:
    """(hack, whether it is planted, seed) of every run; a run of each kind comes before further seeds."""
    return [
        (hack, planted, seed)
        for seed in sorted({*SEEDS, *CLEAN_SEEDS})
        for hack in HACKS
        for planted in (True, False)
        if seed in (SEEDS if planted else CLEAN_SEEDS)
    ]


@dataclass(frozen=True)
class Measured:
    """A run with its signs."""

    hack: str
    planted: bool
    seed: int
    course: Course

    @property
    def shares(self) -> list[float]:
        """The hack's share of the answers, by step."""
        return self.course.hack_shares(self.hack)


def runs_table(runs: Sequence[Measured]) -> list[str]:
    """What happened in each run."""
    lines = [
        "| hack | reward model | seed | hack's share of answers, SFT | last 4 steps | gold, SFT | last 4 steps | KL |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in sorted(runs, key=lambda run: (list(HACKS).index(run.hack), not run.planted, run.seed)):
        gold, kl = run.course.figure("gold"), run.course.figure("kl")[-1]
        shares = run.shares
        lines.append(
            f"| {run.hack} | {'planted' if run.planted else 'clean'} | {run.seed} | {_mean(shares[:WARMUP]):.1%} "
            f"| {_mean(shares[-4:]):.0%} | {_mean(gold[:WARMUP]):.2f} | {_mean(gold[-4:]):.2f} | {kl:.2f} |"
        )
    return lines


def signs_table(runs: Sequence[Measured]) -> list[str]:
    """Of each sign: its threshold, when it speaks in the planted runs, and in how many of the clean ones."""
    planted, clean = ([run for run in runs if run.planted is is_planted] for is_planted in (True, False))
    lines = [
        f"| sign | threshold | speaks, of {len(planted)} planted | steps after the warm-up: median (range) "
        f"| hack's share then: median | speaks, of {len(clean)} clean | AUC |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = []
    for name, sign in SIGNS.items() if clean else ():
        peaks = [float(sustained(sign(run.course)).max()) for run in clean]
        threshold = max(peaks)
        false: Any = "–"
        if len(clean) > 1:
            # the threshold that a clean run is measured by comes from the others
            false = sum(peak > max(peaks[:index] + peaks[index + 1 :]) for index, peak in enumerate(peaks))
        spoken = [first_step(sign(run.course), threshold) for run in planted]
        extremes = [float(sustained(sign(run.course)).max()) for run in planted]
        auc = _mean([(high > low) + 0.5 * (high == low) for high in extremes for low in peaks])
        rows.append((name, f"{abs(threshold):.3f}", spoken, false, f"{auc:.2f}"))
    shipped = [shipped_alarm(run.course) for run in planted]
    false = sum(shipped_alarm(run.course) is not None for run in clean)
    rows.append(("`alarms.exploits`, as shipped", "–", shipped, false, "–"))
    for name, threshold, spoken, false, auc in rows:
        steps = sorted(step - WARMUP for step in spoken if step is not None)
        shares = [run.shares[step - 1] for run, step in zip(planted, spoken, strict=True) if step is not None]
        when = f"{statistics.median(steps):g} ({steps[0]}–{steps[-1]})" if steps else "–"
        share = f"{statistics.median(shares):.0%}" if shares else "–"
        lines.append(f"| {name} | {threshold} | {len(steps)} | {when} | {share} | {false} | {auc} |")
    return lines


def page(runs: Sequence[Measured], command: str) -> str:
    """The tables of docs/over_optimization.md, between its markers."""
    return "\n".join(["", "", *runs_table(runs), "", *signs_table(runs), "", provenance(command), ""])


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder to keep the runs in")
    parser.add_argument("--steps", type=int, default=24, help="steps of each PPO run")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument(
        "--finished", action="store_true", help="train nothing, and show the runs that are there"
    )
    parser.add_argument("--write", action="store_true", help="write the tables to docs/")
    arguments = parser.parse_args()
    models = Models(arguments.runs, arguments.precision)
    measured = []
    for hack, planted, seed in plan():
        run = models.finished(hack, planted, seed)
        if run is None and not arguments.finished:
            run = models.optimize(hack, planted, seed, arguments.steps)
        if run is not None:
            measured.append(Measured(hack, planted, seed, Course.of(run)))
    options = f"--steps {arguments.steps} --precision {arguments.precision}"
    command = f"python scripts/measure_alarms.py --runs FOLDER {options}"
    text = page(measured, command)
    print(text)
    if arguments.write:
        replace_part(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main()
