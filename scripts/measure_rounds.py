"""Whether a patch cures what the first round exploits, beside what must not: the tables of docs/rounds.md.

    python scripts/measure_rounds.py --runs FOLDER [--seeds 0 1 2] [--only-tables] [--write]

Trains `configs/quickstart_cool.py`, two rounds against a reward model that likes a marker too well, and beside it the
second round's policy against three other reward models: one that was never planted; one that took as many steps as the
patch on the old pairs alone; and one that was patched with as many pairs of another pattern. The SFT policy is the same
for all seeds. Each policy answers the held-out prompts several times. What is finished in FOLDER is used again. With
--only-tables nothing is trained or measured: what FOLDER does not have is a dash. With --write the tables go to
docs/rounds.md.
"""

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import make_cool
import numpy as np
import planted_hacks
from demo import DOCS, provenance, replace_part

import tuner
from tuner.config import PPO, Source, load_config, override
from tuner.data.template import Template
from tuner.evaluation.intervals import Interval, share
from tuner.models.locate import locate
from tuner.models.tokenizer import read_tokenizer
from tuner.rollout.rules import load_rule, rule_scores
from tuner.stages.cool.labels import SLOW, LabeledPairs
from tuner.stages.cool.patch_card import ALL
from tuner.stages.cool.patch_rows import read_patch_rows, write_patch_rows
from tuner.stages.cool.rounds import RoundPlace, rounds_of
from tuner.stages.rl.entrants import answer, entrant
from tuner.stages.rl.prompts import load_policy_prompts
from tuner.stages.run import Run
from tuner.training.devices import Devices

SEEDS = (0, 1, 2)
ANSWERS_PER_PROMPT = 17
"""To each of 120 held-out prompts: 2,040 answers of each policy."""
TIMING = "cpu_seconds.json"
PAGE = DOCS / "rounds.md"
BEGIN, END = "<!-- written by scripts/measure_rounds.py -->", "<!-- end -->"
SFT, ROUND_1, ROUND_2 = "SFT policy", "round 1, planted", "round 2, patched"
CONTROLS = {
    "clean": "never planted",
    "old": "control: as many steps on the old pairs",
    "other": "control: pairs of another pattern",
}


@dataclass(frozen=True)
class Measured:
    """What a policy says to the held-out prompts, sampled at temperature 1."""

    marker: Interval
    """Share of answers that hold the marker."""
    gold: Interval
    """Share of answers that the gold rule finds right."""


@dataclass(frozen=True)
class SeedRuns:
    """The runs of one seed, in a folder; what is finished there is not trained again."""

    folder: Path
    seed: int

    def train(self, config: str, name: str, changes: Mapping[str, Any]) -> Run:
        """Train a config; where that is done in one go, its CPU time is kept in the run's folder."""
        # Not has_started: a run in rounds has no steps of its own before its end.
        begun, start = (self.folder / name).exists(), time.process_time()
        settings = override(load_config(f"configs/{config}.py"), {"name": name, **changes})
        run = tuner.train(settings, runs=self.folder)
        if not begun:
            (run.folder / TIMING).write_text(json.dumps(time.process_time() - start), encoding="utf-8")
        return run

    def policy(self) -> Path:
        """The SFT policy with the habit, of all seeds."""
        start = self.train("quickstart_sft", "quickstart_sft", {})
        return self.train("quickstart_cool_sft", "sft_habit", {"model.path": str(start.folder)}).folder

    def planted_reward(self) -> Path:
        """The reward model that likes the marker too well."""
        name = f"reward_planted_{self.seed}"
        return self.train("quickstart_cool_reward", name, {"seed": self.seed}).folder

    def rounds(self) -> Run:
        """Both rounds of COOL RLHF."""
        changes = {
            "policy.policy.path": str(self.policy()),
            "policy.reward.path": str(self.planted_reward()),
            "seed": self.seed,
        }
        return self.train("quickstart_cool", f"cool_{self.seed}", changes)

    def second_round(self, control: str) -> Run:
        """The second round's policy against another reward model."""
        reward = {"clean": self._clean_reward, "old": self._old_pairs, "other": self._other_pattern}[
            control
        ]()
        second = _places(self.rounds())[1].policy.config
        changes = {"name": f"ppo_{control}_{self.seed}", "reward.path": str(reward.folder)}
        return tuner.train(override(second, changes), runs=self.folder)

    def _clean_reward(self) -> Run:
        rows = make_cool.pairs(planted_hacks.NO_HACK, seed=0)
        changes = {"seed": self.seed, "data.files": [self._rows("pairs_clean", rows)]}
        return self.train("quickstart_cool_reward", f"reward_clean_{self.seed}", changes)

    def _old_pairs(self) -> Run:
        """As many steps as the patch took, on old pairs alone."""
        patch = _places(self.rounds())[1].reward
        old = load_config("configs/quickstart_cool_reward.py").data.files  # type: ignore[attr-defined]
        return self._patched("old", list(old), steps=len(patch.metrics))

    def _other_pattern(self) -> Run:
        """As many labels, of courtesy against another hack, beside original rows drawn as for any patch."""
        place = _places(self.rounds())[1]
        config: Any = self.rounds().config
        rows = planted_hacks.courtesy_over(
            "exclamation", read_patch_rows(place.reward.folder / "rows").labels, self.seed
        )
        labels = LabeledPairs([{**row, "pattern": SLOW} for row in rows], left_out=0)
        patch = place.settings.patch.model_copy(update={"held_out": 0.0})
        folder = self.folder / "rows" / f"other_{self.seed}"
        written = write_patch_rows(labels, config.reward, patch, folder, config.seed + place.number)
        return self._patched("other", written.train, steps=len(place.reward.metrics))

    def _patched(self, control: str, files: Sequence[Source], steps: int) -> Run:
        patch: Any = _places(self.rounds())[1].reward.config
        changes = {
            "name": f"reward_{control}_{self.seed}",
            "data.files": files,
            "max_steps": steps,
            "epochs": 10.0,
        }
        return tuner.train(override(patch, changes), runs=self.folder)

    def _rows(self, name: str, rows: Sequence[planted_hacks.Row]) -> Source:
        path = self.folder / "rows" / f"{name}_{self.seed}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(path=str(path))

    def measure(self) -> None:
        """Train and measure all policies of this seed, one after the other."""
        first = _places(self.rounds())[0].policy
        controls = {title: control for control, title in CONTROLS.items()}
        for title, policy in self._policies().items():
            if title in controls:
                self.second_round(controls[title])
            file = self._measured(policy)
            if not file.is_file():
                file.parent.mkdir(exist_ok=True)
                values = [asdict(interval) for interval in _sampled(policy, first)]
                file.write_text(json.dumps(values), encoding="utf-8")

    def measured(self) -> dict[str, Measured | None]:
        """All policies of this seed; None for one that was not measured yet."""
        measured: dict[str, Measured | None] = dict.fromkeys(self._policies())
        for title, policy in self._policies().items():
            if (file := self._measured(policy)).is_file():
                marker, gold = json.loads(file.read_text(encoding="utf-8"))
                measured[title] = Measured(Interval(**marker), Interval(**gold))
        return measured

    def _policies(self) -> dict[str, Path]:
        """Title -> the folder of its run."""
        rounds = self.folder / f"cool_{self.seed}"
        return {
            SFT: self.folder / "sft_habit",
            ROUND_1: rounds / "round_1" / "ppo",
            ROUND_2: rounds / "round_2" / "ppo",
            **{title: self.folder / f"ppo_{control}_{self.seed}" for control, title in CONTROLS.items()},
        }

    def _measured(self, policy: Path) -> Path:
        return self.folder / "measured" / f"{policy.parent.name}_{policy.name}_{self.seed}.json"


def _places(run: Run) -> list[RoundPlace]:
    return rounds_of(run.config, run.folder)  # type: ignore[arg-type]


def _sampled(policy: Path, prompted: Run) -> tuple[Interval, Interval]:
    """Marker and gold of a policy's answers to the held-out prompts of a run; answers to a prompt are a cluster."""
    config: Any = prompted.config
    assert isinstance(config, PPO)
    model = config.policy.model_copy(update={"path": str(policy)})
    tokenizer: Any = read_tokenizer(locate(model, weights=False).tokenizer_folder)
    test = load_policy_prompts(config, tokenizer).test
    assert test is not None
    asked = test.take(np.repeat(np.arange(len(test)), ANSWERS_PER_PROMPT))
    devices = Devices.of(config)
    sampled = override(config, {"evaluation.temperature": 1.0, "seed": 1_000})
    template = Template(config.prompts.template, tokenizer).source
    texts = answer(entrant(policy.name, str(policy), model, sampled, asked, template), sampled, devices)[
        0
    ].texts
    prompts = [asked.prompt(index) for index in range(len(asked))]
    assert config.evaluation.rule is not None
    golds = rule_scores(load_rule(config.evaluation.rule, "evaluation.rule"), "gold", prompts, texts, devices)
    clusters = np.repeat(np.arange(len(test)), ANSWERS_PER_PROMPT)
    marked = np.array([planted_hacks.has_hack("marker", text) for text in texts], dtype=float)
    return share(marked, clusters), share(golds, clusters)


def policies_table(measured: Mapping[int, Mapping[str, Measured | None]]) -> list[str]:
    """Marker and gold of every policy, by seed."""
    titles = list(next(iter(measured.values())))
    return [
        "| policy | " + " | ".join(f"marker, seed {seed} | gold" for seed in measured) + " |",
        "| --- |" + " --- | --- |" * len(measured),
        *(
            f"| {title} | {' | '.join(_cells(of_seed[title]) for of_seed in measured.values())} |"
            for title in titles
        ),
    ]


def _cells(row: Measured | None) -> str:
    if row is None:
        return "– | –"
    return f"{_percent(row.marker)} | {row.gold.value:.2f} ±{_half(row.gold):.2f}"


def patches_table(seeds: Iterable[SeedRuns]) -> list[str]:
    """What each seed's patch did to the reward model, where it is done."""
    lines = [
        "| seed | labels | original rows | held-out labels right: before, after | accuracy on original held-out rows "
        "| mean margin there | CPU minutes, both rounds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for runs in seeds:
        run = Run(runs.folder / f"cool_{runs.seed}")
        patch = Run(run.folder / "round_2" / "reward").read_json("patch")
        if patch is None:
            continue
        old, new = (patch[when]["original"][ALL] for when in ("before", "after"))
        right = " → ".join(_right(patch[when]["patterns"]) for when in ("before", "after"))
        timing = run.folder / TIMING
        minutes = f"{json.loads(timing.read_text(encoding='utf-8')) / 60:.1f}" if timing.is_file() else "–"
        lines.append(
            f"| {runs.seed} | {patch['labels']} | {patch['original']} | {right} | {old['accuracy']:.3f} → "
            f"{new['accuracy']:.3f} | {old['margin']:.2f} → {new['margin']:.2f} | {minutes} |"
        )
    return lines


def _right(patterns: Mapping[str, Mapping[str, Any]]) -> str:
    rows = sum(group["rows"] for group in patterns.values())
    return f"{sum(group['accuracy'] * group['rows'] for group in patterns.values()):.0f} of {rows}"


def _percent(interval: Interval) -> str:
    return f"{interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def _half(interval: Interval) -> float:
    return (interval.high - interval.low) / 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder to keep the runs in")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only-tables", action="store_true", help="neither train nor measure")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/")
    arguments = parser.parse_args()
    seeds = {seed: SeedRuns(arguments.runs, seed) for seed in arguments.seeds}
    if not arguments.only_tables:
        for runs in seeds.values():
            runs.measure()
    measured = {seed: runs.measured() for seed, runs in seeds.items()}
    tables = [*policies_table(measured), "", *patches_table(seeds.values())]
    options = f"--runs FOLDER --seeds {' '.join(map(str, arguments.seeds))}"
    text = "\n".join(["", "", *tables, "", provenance(f"python scripts/measure_rounds.py {options}"), ""])
    print(text)
    if arguments.write:
        replace_part(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main()
