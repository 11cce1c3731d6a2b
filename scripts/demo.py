"""Run the demonstrations and print their tables: `make demo`, or `python scripts/demo.py [--write]`.

    python scripts/demo.py [sft] [reward] [ppo] [smollm2] [smollm2_ppo] [--model FOLDER] [--write]

Trains quickstarts with three seeds and prints results on unseen problems and wordings; without names `sft`, `reward`
and `ppo`. `ppo` trains the whole pipeline with PPO under two conditions, and checks its results against requirements.
`smollm2` and `smollm2_ppo` train a reward model and PPO, with one seed, on the model that scripts/fetch_smollm2.py has
put in FOLDER; the second trains its own reward model, and needs the rows of scripts/make_reasoning.py.
With --write, tables and the curves of the first seed are written to docs/.
"""

import argparse
import datetime
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tuner
from tuner.config import load_config, override
from tuner.stages.evaluate_run import evaluate_run
from tuner.stages.run import Run
from tuner.training.versions import versions

SEEDS = (0, 1, 2)
ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CONTROLS = {
    "seen": "the row's condition, in a trained wording",
    "unseen": "its key word in a sentence of no trained wording",
    "novel": "a wording that shares no content word with the trained ones",
    "blank": "no condition",
    "swapped": "the opposite condition",
}


@dataclass(frozen=True)
class TrainedRun:
    """A run of a demonstration, with its seed and cost."""

    seed: int
    run: Run
    cpu_seconds: float

    @property
    def results(self) -> dict[str, Any]:
        results = self.run.results
        assert results is not None
        return results


@dataclass(frozen=True)
class Demo:
    """A demonstration: the config that is trained, and the table of its results."""

    title: str
    config: str
    seeds: tuple[int, ...]
    page: str
    """Name of its page and picture in docs/."""
    table: Callable[[Sequence[TrainedRun]], list[str]]

    def show(self, overrides: dict[str, Any], command: str, write: bool) -> None:
        """Train with every seed and print the table; write: also save it in docs/."""
        config = load_config(f"configs/{self.config}.py")
        trained: list[TrainedRun] = []
        with tempfile.TemporaryDirectory() as runs:
            for seed in self.seeds:
                start = time.process_time()
                changes = {**overrides, "seed": seed, "name": f"seed_{seed}"}
                run = tuner.train(override(config, changes), runs=runs)
                trained.append(TrainedRun(seed, run, time.process_time() - start))
            text = "\n".join([f"# {self.title}", "", *self.table(trained), "", provenance(command), ""])
            print(text)
            if write:
                (DOCS / f"{self.page}.md").write_text(text, encoding="utf-8")
                shutil.copy(
                    trained[0].run.folder / "curves.png", DOCS / f"{self.page.removesuffix('_seeds')}.png"
                )


def sums_table(trained: Sequence[TrainedRun]) -> list[str]:
    """Table of scores and losses before and after training, by seed."""
    lines = [
        "Score: share of sums of two numbers below 100 answered exactly, with greedy decoding. Loss: nats per trained",
        "token. Both on 200 held-out problems, which do not occur in training in any wording or order.",
        "",
        "| seed | score before | score after | loss before | loss after | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    gains = []
    for run in trained:
        before, after = run.results["before"], run.results["after"]
        gains.append(after["score"] - before["score"])
        lines.append(
            f"| {run.seed} | {before['score']:.3f} | {after['score']:.3f} "
            f"| {before['loss']:.3f} | {after['loss']:.3f} | {run.cpu_seconds:.0f} |"
        )
    return [
        *lines,
        "",
        f"The score rises by {statistics.mean(gains):.3f} on average, and by at least {min(gains):.3f}.",
    ]


def twins_table(trained: Sequence[TrainedRun]) -> list[str]:
    """Table of accuracy, and of twins with both right, under every control, by seed."""
    rows = trained[0].results["overall"]["rows"]
    columns = [f"seed {run.seed}" for run in trained]
    lines = [
        "Twins are two rows with the same two answers, under two conditions with opposite preferences. Each cell:",
        f"accuracy / share of twins with both correct, over the twins among {rows:,} held-out rows, whose prompts do",
        "not occur in training.",
        "",
        f"| condition in the system prompt | {' | '.join(columns)} |",
        f"| --- |{' --- |' * len(columns)}",
    ]
    for control, meaning in CONTROLS.items():
        measures = (run.results[control] for run in trained)
        cells = (f"{measure['accuracy']:.3f} / {measure['twins']:.3f}" for measure in measures)
        lines.append(f"| {control}: {meaning} | {' | '.join(cells)} |")
    accuracies = {f"rows of `{name}`": [] for name in sorted(trained[0].results["conditions"])}
    for run in trained:
        for name, group in run.results["conditions"].items():
            accuracies[f"rows of `{name}`"].append(group["accuracy"])
    accuracies["all rows"] = [run.results["overall"]["accuracy"] for run in trained]
    for name, values in accuracies.items():
        lines.append(f"| {name}, accuracy | {' | '.join(f'{value:.3f}' for value in values)} |")
    lines.append(f"| CPU seconds, whole run | {' | '.join(f'{run.cpu_seconds:.0f}' for run in trained)} |")
    return lines


@dataclass(frozen=True)
class Requirement:
    """A requirement on a demonstration's results, and the measured value."""

    quantity: str
    required: str
    measured: str
    holds: bool


def show_pipeline(command: str, write: bool) -> None:
    """Train SFT, reward model, PPO under two conditions, and DPO from the same SFT run, with every seed.

    Exits with 1 if a requirement is missed.
    """
    results: list[PolicyResult] = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            results += _pipeline(seed, Path(folder), write and seed == SEEDS[0])
    table, requirements = policy_table(results), policy_requirements(results)
    lines = [*PIPELINE_HEAD, *table, "", *_requirement_table(requirements), "", provenance(command), ""]
    print("\n".join(lines))
    if write:
        (DOCS / "quickstart_ppo_seeds.md").write_text("\n".join(lines), encoding="utf-8")
        _replace_table(DOCS / "reinforcement_learning.md", "quickstart_ppo", table)
    if not all(requirement.holds for requirement in requirements):
        sys.exit(1)


PIPELINE_HEAD = [
    "# PPO quickstart: results",
    "",
    "SFT, a reward model and PPO, each trained anew with every seed; PPO twice from the same SFT run, on the same",
    "prompts, under `polite` and under `blunt`. The policies answer 120 held-out sums at temperature 1. Gold is the",
    "share of correct sums in the requested style, by the rule in `configs/quickstart_ppo.py`: for the SFT policy,",
    "for PPO, and for PPO under the other condition. Win rates count ties half, by the rule and by the reward model;",
    "DPO is trained on the pairs of `polite` from the same SFT run. Replay is the loss on held-out sums of the SFT",
    "data, in nats per trained token; KL is the divergence from the SFT policy, in nats per token; seconds are of",
    "SFT, the reward model and this PPO run.",
    "",
]


@dataclass(frozen=True)
class PolicyResult:
    """Results of PPO under one condition, with one seed."""

    seed: int
    condition: str
    card: Mapping[str, Any]
    """Results of `tuner eval` against the SFT policy, PPO's under the other condition, and DPO's."""
    results: dict[str, Any]
    """Results of the run."""
    seconds: tuple[float, ...]
    """CPU time of SFT, reward model and PPO."""

    def gold(self, name: str) -> float:
        """Gold score of a policy under this condition."""
        return next(
            card["gold"]["value"] for card in (self.card, *self.card["against"]) if card["name"] == name
        )

    def wins(self, name: str) -> str:
        """Win rates against another policy, by the rule and by the reward model."""
        wins = next(card["wins"] for card in self.card["against"] if card["name"] == name)
        return ", ".join(f"{wins[judge]['rate']['value']:.0%}" for judge in ("gold", "score"))

    @property
    def gold_gain(self) -> float:
        """Gold score minus that of the SFT policy."""
        return self.gold(self.condition) - self.gold("quickstart_sft")

    @property
    def condition_gain(self) -> float:
        """Gold score minus that of the policy trained under the other condition."""
        return self.gold(self.condition) - self.gold(OPPOSITE[self.condition])

    @property
    def replay_increase(self) -> float:
        """Relative increase of the loss on held-out replay rows."""
        return self.results["replay"]["after"] / self.results["replay"]["before"] - 1


OPPOSITE = {"polite": "blunt", "blunt": "polite"}


def policy_table(results: Sequence[PolicyResult]) -> list[str]:
    """Table of gold score, win rates, replay loss and KL, by seed and condition."""
    lines = [
        "| seed | condition | gold: SFT, PPO, PPO under the other | win rates over SFT | over DPO "
        "| replay loss before, after | KL | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        condition = result.condition
        golds = [result.gold(name) for name in ("quickstart_sft", condition, OPPOSITE[condition])]
        replay = result.results["replay"]
        dpo = result.wins("quickstart_dpo") if condition == "polite" else ""
        lines.append(
            f"| {result.seed} | `{condition}` | {', '.join(f'{gold:.3f}' for gold in golds)} "
            f"| {result.wins('quickstart_sft')} | {dpo} | {replay['before']:.4f}, {replay['after']:.4f} "
            f"| {result.results['kl']:.2f} | {', '.join(f'{second:.0f}' for second in result.seconds)} |"
        )
    return lines


def policy_requirements(results: Sequence[PolicyResult]) -> list[Requirement]:
    """Requirements on the pipeline, with the worst values over seeds and conditions."""
    gain = min(result.gold_gain for result in results)
    condition_gain = min(result.condition_gain for result in results)
    replay = max(result.replay_increase for result in results)
    seconds = max(sum(result.seconds) for result in results)
    return [
        Requirement("gold minus the SFT policy's, at least", "0.1", f"{gain:.3f}", gain >= 0.1),
        Requirement(
            "gold minus that of PPO under the other condition, at least",
            "0.1",
            f"{condition_gain:.3f}",
            condition_gain >= 0.1,
        ),
        Requirement("increase of the replay loss, at most", "3%", f"{replay:+.1%}", replay <= 0.03),
        Requirement("CPU seconds, at most", "720", f"{seconds:.0f}", seconds <= 720),
    ]


def _requirement_table(requirements: Sequence[Requirement]) -> list[str]:
    rows = (
        f"| {row.quantity} | {row.required} | {row.measured} | {'yes' if row.holds else 'NO'} |"
        for row in requirements
    )
    return [
        "| worst over seeds and conditions | required | measured | holds |",
        "| --- | --- | --- | --- |",
        *rows,
    ]


def _pipeline(seed: int, runs: Path, write: bool) -> list[PolicyResult]:
    """Train and evaluate all stages with one seed."""
    seconds: dict[str, float] = {}

    def train(config: str, changes: dict[str, Any]) -> Run:
        start = time.process_time()
        run = tuner.train(override(load_config(f"configs/{config}.py"), {"seed": seed, **changes}), runs=runs)
        seconds[run.folder.name] = time.process_time() - start
        return run

    sft = train("quickstart_sft", {}).folder
    reward = train("quickstart_reward", {}).folder
    models = {"policy.path": str(sft), "reward.path": str(reward)}
    policies = {
        name: train("quickstart_ppo", {**models, "name": name, **_condition_changes(name)})
        for name in OPPOSITE
    }
    dpo = train("quickstart_dpo", {"model.path": str(sft), "adapter": None}).folder
    if write:
        shutil.copy(policies["polite"].folder / "curves.png", DOCS / "quickstart_ppo.png")
    results: list[PolicyResult] = []
    for name, run in policies.items():
        card = evaluate_run(
            run.folder, against=[str(sft), str(runs / OPPOSITE[name]), str(dpo)], trust=True
        ).results
        stage_seconds = tuple(seconds[stage] for stage in (sft.name, reward.name, name))
        assert run.results is not None
        results.append(PolicyResult(seed, name, card, run.results, stage_seconds))
    return results


def _condition_changes(condition: str) -> dict[str, Any]:
    """Changes to quickstart_ppo that put its prompts under another condition."""
    prompts = load_config("configs/quickstart_ppo.py").prompts  # type: ignore[attr-defined]
    return {
        f"prompts.{name}": [
            source.model_copy(update={"condition": condition}) for source in getattr(prompts, name)
        ]
        for name in ("files", "test_files")
    }


def show_smollm2_policy(model: str, runs: str | None, command: str, write: bool) -> None:
    """Train SmolLM2's reward model, and PPO on sums of reasoning-gym.

    runs: folder to keep both runs in, and to resume them from; None: a temporary one.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs_folder = Path(runs or folder)
        reward = override(load_config("configs/smollm2_135m_reward.py"), {"model.path": model})
        changes = {"policy.path": model, "reward.path": str(tuner.train(reward, runs=runs_folder).folder)}
        start = time.process_time()
        run = tuner.train(override(load_config("configs/smollm2_135m_ppo.py"), changes), runs=runs_folder)
        seconds = time.process_time() - start
        text = "\n".join(
            [
                *SMOLLM2_HEAD,
                *smollm2_table(run),
                f"| CPU seconds | | {seconds:.0f} |",
                "",
                provenance(command),
                "",
            ]
        )
        print(text)
        if write:
            (DOCS / "smollm2_ppo.md").write_text(text, encoding="utf-8")
            shutil.copy(run.folder / "curves.png", DOCS / "smollm2_ppo.png")


SMOLLM2_HEAD = [
    "# PPO on SmolLM2-135M-Instruct: results",
    "",
    "Sums and differences of numbers up to ten, as worded by reasoning-gym, under the condition `brief` of the reward",
    "model of `configs/smollm2_135m_reward.py`. Gold is the share of held-out prompts answered correctly in at most",
    "eight words, by reasoning-gym's score of the last number in the answer, with greedy decoding. Rollouts are",
    "sampled at temperature 1.",
    "",
]


def smollm2_table(run: Run) -> list[str]:
    """Table of gold score and reward on held-out prompts, and of the rollouts, before and after training."""
    results, (first, *_, last) = run.results, run.metrics
    assert results is not None
    lines = ["| | before | after |", "| --- | --- | --- |"]
    for name in ("gold", "score"):
        measure = results[name]
        lines.append(f"| {name}, held-out prompts | {measure['before']:.3f} | {measure['after']:.3f} |")
    for name, meaning in (("length", "tokens per answer"), ("ended", "share of answers that end")):
        lines.append(f"| {meaning}, rollouts | {first[name]:.2f} | {last[name]:.2f} |")
    return [*lines, f"| KL from the initial policy, nats per token | | {results['kl']:.2f} |"]


def _replace_table(page: Path, name: str, table: Sequence[str]) -> None:
    """Replace the table with this name in a page."""
    marks = f"<!-- {name}: written by scripts/demo.py -->", f"<!-- {name}: end -->"
    replace_part(page, *marks, "\n".join(["", "", *table, "", ""]))


def replace_part(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marker comments in a page of docs/, and in its translation, where it has one.

    The translation gets the same text, in English, so that it cannot go stale. Ends the program where a marker is
    missing.
    """
    for each in (page, page.with_suffix(".zh.md")):
        if each != page and not each.is_file():
            continue
        before, first, rest = each.read_text(encoding="utf-8").partition(begin)
        _, last, after = rest.partition(end)
        if not (first and last):
            sys.exit(f"{each}: the lines {begin} and {end}, between which tables go, are missing; add them")
        each.write_text(before + begin + text + end + after, encoding="utf-8")


def provenance(command: str) -> str:
    """When, with which command, and on which machine and versions results were measured."""
    installed = versions()
    return (
        f"Measured on {datetime.date.today()} by `{command}`: {platform.machine()} CPU, one thread, "
        f"{', '.join(f'{name} {installed[name]}' for name in ('torch', 'transformers', 'bitsandbytes'))}."
    )


DEMOS = {
    "sft": Demo("SFT quickstart: results", "quickstart_sft", SEEDS, "quickstart_seeds", sums_table),
    "reward": Demo(
        "Reward quickstart: results",
        "quickstart_reward",
        SEEDS,
        "quickstart_reward_seeds",
        twins_table,
    ),
    "smollm2": Demo(
        "Reward model on SmolLM2-135M-Instruct: results",
        "smollm2_135m_reward",
        (0,),
        "smollm2_reward",
        twins_table,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demos", nargs="*", choices=[*DEMOS, "ppo", "smollm2_ppo"], default=[])
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--runs", help="folder to keep the runs of smollm2_ppo in, and to resume them from")
    parser.add_argument("--write", action="store_true", help="write tables and pictures to docs/")
    arguments = parser.parse_args()
    for name in arguments.demos or ("sft", "reward", "ppo"):
        with_model = name.startswith("smollm2") and arguments.model
        command = f"python scripts/demo.py {name}{' --model FOLDER' if with_model else ''} --write"
        if name == "ppo":
            show_pipeline(command, arguments.write)
        elif name == "smollm2_ppo":
            model = arguments.model or load_config("configs/smollm2_135m_ppo.py").policy.path  # type: ignore[attr-defined]
            show_smollm2_policy(model, arguments.runs, command, arguments.write)
        else:
            DEMOS[name].show({"model.path": arguments.model} if with_model else {}, command, arguments.write)


if __name__ == "__main__":
    main()
