"""The demonstrations in full, with their tables: `make demo`, or `python scripts/demo.py [--write]`.

    python scripts/demo.py [sft] [reward] [ppo] [smollm2 --model FOLDER] [--write]

Trains the quickstarts with three seeds and prints what they teach, on problems and wordings they never saw; without
names all three. `ppo` trains the whole pipeline, and asks the same prompts under two conditions. `smollm2` is the
reward demonstration on a real small model, with one seed, that scripts/fetch_smollm2.py has put in FOLDER. With
--write the tables go to docs/, and the pictures of the first runs.
"""

import argparse
import datetime
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tuner
from tuner.config import load_config, override
from tuner.stages.evaluating import evaluate_run
from tuner.training.run import Run, versions

SEEDS = (0, 1, 2)
DOCS = Path(__file__).resolve().parent.parent / "docs"
WAYS = {
    "seen": "the row's condition, in a wording of the training",
    "unseen": "its key word in a sentence that occurs in no training wording",
    "novel": "a wording that shares no content word with the trained ones",
    "blank": "no condition",
    "swapped": "the opposite condition",
}


@dataclass(frozen=True)
class Trained:
    """One run of a demonstration."""

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
    """A demonstration: what is trained, and the table that shows what came of it."""

    title: str
    config: str
    seeds: tuple[int, ...]
    page: str
    """Name of its page and picture in docs."""
    table: Callable[[Sequence[Trained]], list[str]]

    def show(self, overrides: dict[str, Any], command: str, write: bool) -> None:
        """Train it with every seed, print the table, and keep it where asked."""
        config = load_config(f"configs/{self.config}.py")
        trained: list[Trained] = []
        with tempfile.TemporaryDirectory() as runs:
            for seed in self.seeds:
                start = time.process_time()
                changes = {**overrides, "seed": seed, "name": f"seed_{seed}"}
                run = tuner.train(override(config, changes), runs=runs)
                trained.append(Trained(seed, run, time.process_time() - start))
            text = "\n".join([f"# {self.title}", "", *self.table(trained), "", measured(command), ""])
            print(text)
            if write:
                (DOCS / f"{self.page}.md").write_text(text, encoding="utf-8")
                shutil.copy(
                    trained[0].run.folder / "curves.png", DOCS / f"{self.page.removesuffix('_seeds')}.png"
                )


def sums_table(trained: Sequence[Trained]) -> list[str]:
    """Scores and losses before and after, by seed."""
    lines = [
        "Share of sums of two numbers below 100 answered exactly, greedily, and the loss in nats per learned token,",
        "on 200 problems that occur in training in no wording and no order.",
        "",
        "| seed | score before | score after | loss before | loss after | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    gains = []
    for one in trained:
        before, after = one.results["before"], one.results["after"]
        gains.append(after["score"] - before["score"])
        lines.append(
            f"| {one.seed} | {before['score']:.3f} | {after['score']:.3f} "
            f"| {before['loss']:.3f} | {after['loss']:.3f} | {one.cpu_seconds:.0f} |"
        )
    return [*lines, "", f"Score up by {statistics.mean(gains):.3f} on average, by {min(gains):.3f} at least."]


def twins_table(trained: Sequence[Trained]) -> list[str]:
    """Accuracy, and twins both right, under every control, by seed."""
    rows = trained[0].results["overall"]["rows"]
    columns = [f"seed {one.seed}" for one in trained]
    lines = [
        "Twins are the same two answers under two conditions that prefer opposite ones. Each cell: share of pairs",
        f"in the right order / share of twins with both right, of the twins among {rows:,} held-out rows, whose",
        "prompts occur in no training row.",
        "",
        f"| asked about with | {' | '.join(columns)} |",
        f"| --- |{' --- |' * len(columns)}",
    ]
    for way, meaning in WAYS.items():
        cells = (one.results[way] for one in trained)
        told = (f"{cell['accuracy']:.3f} / {cell['twins']:.3f}" for cell in cells)
        lines.append(f"| {way}: {meaning} | {' | '.join(told)} |")
    accuracies = {f"rows of `{name}`": [] for name in sorted(trained[0].results["conditions"])}
    for one in trained:
        for name, group in one.results["conditions"].items():
            accuracies[f"rows of `{name}`"].append(group["accuracy"])
    accuracies["all rows"] = [one.results["overall"]["accuracy"] for one in trained]
    for name, values in accuracies.items():
        lines.append(f"| {name}, accuracy | {' | '.join(f'{value:.3f}' for value in values)} |")
    lines.append(f"| CPU seconds, all of it | {' | '.join(f'{one.cpu_seconds:.0f}' for one in trained)} |")
    return lines


def show_pipeline(command: str, write: bool) -> None:
    """SFT, reward model, and PPO under two conditions, with every seed; DPO from the same SFT run beside them."""
    golds: list[str] = []
    figures: list[str] = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            rows, row = _pipeline(seed, Path(folder), write and seed == SEEDS[0])
            golds += rows
            figures.append(row)
    lines = [*PIPELINE_HEAD, *golds, *FIGURES_HEAD, *figures, "", measured(command), ""]
    print("\n".join(lines))
    if write:
        (DOCS / "quickstart_ppo_seeds.md").write_text("\n".join(lines), encoding="utf-8")


PIPELINE_HEAD = [
    "# What the PPO quickstart teaches",
    "",
    "SFT, a reward model and PPO with three seeds, each with its own of all three. The policies answer 120 held-out",
    "sums; gold is the share of answers with the right sum in the manner asked for, by the rule in",
    "`configs/quickstart_ppo.py`, over answers sampled at temperature 1. PPO ran twice from the same SFT run, on the",
    "same prompts, under `polite` and under `blunt`; DPO learned the pairs of `polite` from the same SFT run.",
    "",
    "| seed | gold under | SFT | PPO under `polite` | PPO under `blunt` | DPO |",
    "| --- | --- | --- | --- | --- | --- |",
]
FIGURES_HEAD = [
    "",
    "PPO under `polite`: how often it wins, ties half, by the rule and by the reward model; the loss on held-out rows",
    "of the replay set in nats per learned token; how far it went from the SFT policy; and what the pipeline took.",
    "",
    "| seed | against SFT: rule, reward model | against DPO: rule, reward model | replay loss before, after, rise "
    "| KL, nats per token | CPU seconds: SFT, reward model, PPO |",
    "| --- | --- | --- | --- | --- | --- |",
]


def _pipeline(seed: int, runs: Path, write: bool) -> tuple[list[str], str]:
    """Rows of the two tables: everything trained with one seed."""
    seconds: list[float] = []

    def trained(name: str, changes: dict[str, Any]) -> Run:
        start = time.process_time()
        run = tuner.train(override(load_config(f"configs/{name}.py"), {"seed": seed, **changes}), runs=runs)
        seconds.append(time.process_time() - start)
        return run

    sft = trained("quickstart_sft", {}).folder
    reward = trained("quickstart_reward", {}).folder
    models = {"policy.path": str(sft), "reward.path": str(reward)}
    ppo = trained("quickstart_ppo", models)
    blunt = trained("quickstart_ppo", {**models, "name": "blunt", **_under("blunt")})
    dpo = trained("quickstart_dpo", {"model.path": str(sft), "adapter": None})
    if write:
        shutil.copy(ppo.folder / "curves.png", DOCS / "quickstart_ppo.png")
    shown = [run.name for run in (sft, ppo.folder, blunt.folder, dpo.folder)]
    found = evaluate_run(ppo.folder, against=[str(runs / name) for name in shown if name != ppo.folder.name])
    opposite = evaluate_run(blunt.folder, against=[str(runs / name) for name in shown if name != "blunt"])
    golds = []
    for condition, results in (("polite", found.results), ("blunt", opposite.results)):
        everyone = {one["name"]: one["gold"]["value"] for one in (results, *results["against"])}
        told = " | ".join(f"{everyone[name]:.3f}" for name in shown)
        golds.append(f"| {seed} | `{condition}` | {told} |")
    results = ppo.results
    assert results is not None
    before, after = results["replay"]["before"], results["replay"]["after"]
    return golds, (
        f"| {seed} | {_wins(found.results, sft.name)} | {_wins(found.results, dpo.folder.name)} "
        f"| {before:.4f}, {after:.4f}, {after / before - 1:+.1%} | {results['kl']:.3f} "
        f"| {', '.join(f'{one:.0f}' for one in seconds[:3])} |"
    )


def _under(condition: str) -> dict[str, Any]:
    """Changes to quickstart_ppo that ask its prompts under another condition."""
    prompts = load_config("configs/quickstart_ppo.py").prompts  # type: ignore[attr-defined]
    return {
        f"prompts.{name}": [
            source.model_copy(update={"condition": condition}) for source in getattr(prompts, name)
        ]
        for name in ("files", "test_files")
    }


def _wins(results: Mapping[str, Any], name: str) -> str:
    """How often the policy wins against another, by the rule and by the reward model."""
    wins = next(one["wins"] for one in results["against"] if one["name"] == name)
    return ", ".join(f"{wins[judge]['rate']['value']:.0%}" for judge in ("gold", "score"))


def measured(command: str) -> str:
    """On what, and how."""
    used = versions()
    return (
        f"Measured on {datetime.date.today()} by `{command}`: {platform.machine()} CPU, one thread, "
        f"torch {used['torch']}, transformers {used['transformers']}, bitsandbytes {used['bitsandbytes']}."
    )


DEMOS = {
    "sft": Demo("What the quickstart teaches", "quickstart_sft", SEEDS, "quickstart_seeds", sums_table),
    "reward": Demo(
        "What the reward quickstart teaches",
        "quickstart_reward",
        SEEDS,
        "quickstart_reward_seeds",
        twins_table,
    ),
    "smollm2": Demo(
        "What SmolLM2-135M-Instruct learns of the same twins",
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
    parser.add_argument("demos", nargs="*", choices=[*DEMOS, "ppo"], default=[])
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--write", action="store_true", help="keep the tables and pictures in docs/")
    asked = parser.parse_args()
    for name in asked.demos or ("sft", "reward", "ppo"):
        if name == "ppo":
            show_pipeline("python scripts/demo.py ppo --write", asked.write)
            continue
        changes = {"model.path": asked.model} if name == "smollm2" and asked.model else {}
        folder = " --model FOLDER" if changes else ""
        DEMOS[name].show(changes, f"python scripts/demo.py {name}{folder} --write", asked.write)


if __name__ == "__main__":
    main()
