"""The demonstrations in full, with their tables: `make demo`, or `python scripts/demo.py [--write]`.

    python scripts/demo.py [sft] [reward] [ppo] [smollm2] [smollm2_ppo] [--model FOLDER] [--write]

Trains the quickstarts with three seeds and prints what they teach, on problems and wordings they never saw; without
names all three. `ppo` trains the whole pipeline, asks the same prompts under two conditions, and says whether it shows
what it is to show. `smollm2` and `smollm2_ppo` are the reward model and PPO on a real small model, with one seed, that
scripts/fetch_smollm2.py has put in FOLDER; the second trains its reward model, too, and needs the rows of
scripts/make_reasoning.py.
With --write the tables and the pictures of the first runs go to docs/.
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
        "Share of sums of two numbers below 100 answered exactly under greedy decoding, and the loss in nats per",
        "trained token, on 200 held-out problems that occur in training in no wording and no order.",
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
        f"| condition given to the model | {' | '.join(columns)} |",
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


@dataclass(frozen=True)
class Limit:
    """What a demonstration is to show, and what it showed."""

    what: str
    asked: str
    found: str
    holds: bool


def show_pipeline(command: str, write: bool) -> None:
    """SFT, reward model, and PPO under two conditions, with every seed; DPO from the same SFT run beside them.

    Exits with 1 where it does not show what it is to show.
    """
    found: list[Taught] = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            found += _pipeline(seed, Path(folder), write and seed == SEEDS[0])
    table, limits = policy_table(found), policy_limits(found)
    lines = [*PIPELINE_HEAD, *table, "", *_limit_table(limits), "", measured(command), ""]
    print("\n".join(lines))
    if write:
        (DOCS / "quickstart_ppo_seeds.md").write_text("\n".join(lines), encoding="utf-8")
        _replace_table(DOCS / "reinforcement_learning.md", "quickstart_ppo", table)
    if not all(limit.holds for limit in limits):
        sys.exit(1)


PIPELINE_HEAD = [
    "# What the PPO quickstart teaches",
    "",
    "SFT, a reward model and PPO with three seeds, each seed with its own of all three; PPO twice from the same",
    "SFT run, on the same prompts, under `polite` and under `blunt`. The policies answer 120 held-out sums at",
    "temperature 1. Gold is the share of answers with the right sum in the requested manner, by the rule in",
    "`configs/quickstart_ppo.py`: of the SFT policy, of PPO's, and of the policy trained under the other",
    "condition. Wins are shares of prompts, ties counting half, by the rule and by the reward model; DPO is",
    "trained on the pairs of `polite` from that SFT run. Replay is the loss on held-out sums of the SFT data, in",
    "nats per trained token; KL is the divergence from the SFT policy, in nats per token; seconds are of SFT,",
    "reward model and this PPO.",
    "",
]


@dataclass(frozen=True)
class Taught:
    """What PPO taught under one condition, with one seed."""

    seed: int
    condition: str
    card: Mapping[str, Any]
    """Of `tuner eval`, against the SFT policy, PPO's under the other condition, and DPO's."""
    results: dict[str, Any]
    """Of the run."""
    seconds: tuple[float, ...]
    """CPU time of SFT, reward model and PPO."""

    def gold(self, name: str) -> float:
        """Of a policy under this condition."""
        return next(one["gold"]["value"] for one in (self.card, *self.card["against"]) if one["name"] == name)

    def wins(self, name: str) -> str:
        """How often it wins against another policy, by the rule and by the reward model."""
        wins = next(one["wins"] for one in self.card["against"] if one["name"] == name)
        return ", ".join(f"{wins[judge]['rate']['value']:.0%}" for judge in ("gold", "score"))

    @property
    def rise(self) -> float:
        """Of gold over the SFT policy's."""
        return self.gold(self.condition) - self.gold("quickstart_sft")

    @property
    def steered(self) -> float:
        """How far its gold is above that of the policy taught under the other condition."""
        return self.gold(self.condition) - self.gold(OTHER[self.condition])

    @property
    def replay_rise(self) -> float:
        """Of the loss on held-out replay rows, relative."""
        return self.results["replay"]["after"] / self.results["replay"]["before"] - 1


OTHER = {"polite": "blunt", "blunt": "polite"}


def policy_table(found: Sequence[Taught]) -> list[str]:
    """Gold, wins, replay loss and distance, by seed and condition."""
    lines = [
        "| seed | condition | gold: SFT, PPO, PPO under the other | wins over SFT | wins over DPO "
        "| replay loss before, after | KL | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        golds = [one.gold(name) for name in ("quickstart_sft", one.condition, OTHER[one.condition])]
        replay = one.results["replay"]
        dpo = one.wins("quickstart_dpo") if one.condition == "polite" else ""
        lines.append(
            f"| {one.seed} | `{one.condition}` | {', '.join(f'{gold:.3f}' for gold in golds)} "
            f"| {one.wins('quickstart_sft')} | {dpo} | {replay['before']:.4f}, {replay['after']:.4f} "
            f"| {one.results['kl']:.2f} | {', '.join(f'{second:.0f}' for second in one.seconds)} |"
        )
    return lines


def policy_limits(found: Sequence[Taught]) -> list[Limit]:
    """What the pipeline is to show, of the seed and condition that show it least."""
    rise, steered = min(one.rise for one in found), min(one.steered for one in found)
    replay, seconds = max(one.replay_rise for one in found), max(sum(one.seconds) for one in found)
    return [
        Limit("gold minus the SFT policy's, at least", "0.1", f"{rise:.3f}", rise >= 0.1),
        Limit(
            "gold minus that of PPO under the other condition, at least",
            "0.1",
            f"{steered:.3f}",
            steered >= 0.1,
        ),
        Limit("rise of the replay loss, at most", "3%", f"{replay:+.1%}", replay <= 0.03),
        Limit("CPU seconds, at most", "720", f"{seconds:.0f}", seconds <= 720),
    ]


def _limit_table(limits: Sequence[Limit]) -> list[str]:
    rows = (f"| {one.what} | {one.asked} | {one.found} | {'yes' if one.holds else 'NO'} |" for one in limits)
    return [
        "| worst of all seeds and conditions | required | measured | holds |",
        "| --- | --- | --- | --- |",
        *rows,
    ]


def _pipeline(seed: int, runs: Path, write: bool) -> list[Taught]:
    """Everything trained with one seed."""
    seconds: dict[str, float] = {}

    def trained(config: str, changes: dict[str, Any]) -> Run:
        start = time.process_time()
        run = tuner.train(override(load_config(f"configs/{config}.py"), {"seed": seed, **changes}), runs=runs)
        seconds[run.folder.name] = time.process_time() - start
        return run

    sft = trained("quickstart_sft", {}).folder
    reward = trained("quickstart_reward", {}).folder
    models = {"policy.path": str(sft), "reward.path": str(reward)}
    policies = {name: trained("quickstart_ppo", {**models, "name": name, **_under(name)}) for name in OTHER}
    dpo = trained("quickstart_dpo", {"model.path": str(sft), "adapter": None}).folder
    if write:
        shutil.copy(policies["polite"].folder / "curves.png", DOCS / "quickstart_ppo.png")
    found = []
    for name, run in policies.items():
        card = evaluate_run(run.folder, against=[str(sft), str(runs / OTHER[name]), str(dpo)]).results
        spent = tuple(seconds[one] for one in (sft.name, reward.name, name))
        assert run.results is not None
        found.append(Taught(seed, name, card, run.results, spent))
    return found


def _under(condition: str) -> dict[str, Any]:
    """Changes to quickstart_ppo that ask its prompts under another condition."""
    prompts = load_config("configs/quickstart_ppo.py").prompts  # type: ignore[attr-defined]
    return {
        f"prompts.{name}": [
            source.model_copy(update={"condition": condition}) for source in getattr(prompts, name)
        ]
        for name in ("files", "test_files")
    }


def show_real_policy(model: str, runs: str | None, command: str, write: bool) -> None:
    """PPO of SmolLM2 on sums of reasoning-gym, with its reward model.

    runs: folder in which to keep both runs, and to go on with those that are there.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(runs or folder)
        reward = override(load_config("configs/smollm2_135m_reward.py"), {"model.path": model})
        changes = {"policy.path": model, "reward.path": str(tuner.train(reward, runs=place).folder)}
        start = time.process_time()
        run = tuner.train(override(load_config("configs/smollm2_135m_ppo.py"), changes), runs=place)
        seconds = time.process_time() - start
        text = "\n".join(
            [*REAL_HEAD, *real_table(run), f"| CPU seconds | | {seconds:.0f} |", "", measured(command), ""]
        )
        print(text)
        if write:
            (DOCS / "smollm2_ppo.md").write_text(text, encoding="utf-8")
            shutil.copy(run.folder / "curves.png", DOCS / "smollm2_ppo.png")


REAL_HEAD = [
    "# What SmolLM2-135M-Instruct learns by PPO",
    "",
    "Sums and differences of numbers up to ten, in the words of reasoning-gym, under the condition `brief` of the",
    "reward model of `configs/smollm2_135m_reward.py`. Gold is the share of held-out prompts answered correctly",
    "in at most eight words, by reasoning-gym's own score of the last number in the answer, under greedy",
    "decoding. Answers of the rollouts are sampled at temperature 1.",
    "",
]


def real_table(run: Run) -> list[str]:
    """Gold and score on held-out prompts, and what the rollouts looked like, before and after."""
    results, (first, *_, last) = run.results, run.metrics
    assert results is not None
    lines = ["| | before | after |", "| --- | --- | --- |"]
    for name in ("gold", "score"):
        measure = results[name]
        lines.append(f"| {name}, held-out prompts | {measure['before']:.3f} | {measure['after']:.3f} |")
    for name, told in (("length", "tokens of an answer"), ("ended", "answers that end by themselves")):
        lines.append(f"| {told}, rollouts | {first[name]:.2f} | {last[name]:.2f} |")
    return [*lines, f"| KL from the start, nats per token | | {results['kl']:.2f} |"]


def _replace_table(page: Path, name: str, table: Sequence[str]) -> None:
    """Replace the table of that name in a page."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: written by scripts/demo.py -->", f"<!-- {name}: end -->"
    if not 0 <= text.find(begin) < text.find(end):
        sys.exit(f"{page}: has no lines {begin} and {end} to put the table between")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    page.write_text("\n".join([before + begin, "", *table, "", end + after]), encoding="utf-8")


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
    parser.add_argument("demos", nargs="*", choices=[*DEMOS, "ppo", "smollm2_ppo"], default=[])
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument(
        "--runs", help="folder to keep the runs of smollm2_ppo in, and to go on with those there"
    )
    parser.add_argument("--write", action="store_true", help="keep the tables and pictures in docs/")
    asked = parser.parse_args()
    for name in asked.demos or ("sft", "reward", "ppo"):
        real = name.startswith("smollm2") and asked.model
        command = f"python scripts/demo.py {name}{' --model FOLDER' if real else ''} --write"
        if name == "ppo":
            show_pipeline(command, asked.write)
        elif name == "smollm2_ppo":
            model = asked.model or load_config("configs/smollm2_135m_ppo.py").policy.path  # type: ignore[attr-defined]
            show_real_policy(model, asked.runs, command, asked.write)
        else:
            DEMOS[name].show({"model.path": asked.model} if real else {}, command, asked.write)


if __name__ == "__main__":
    main()
