"""What a PPO step costs: tuner and the flat twin of the tests, packed and padded, and what the roles hold, in one run.

    python benchmarks/ppo_cost.py [--rounds 3] [--write]

The twin (tests/oracle/flat_ppo.py) is PPO on one page: one frozen base, four adapters, no run folder, no figures of a
step's health. tests/oracle/test_ppo.py shows that its numbers are tuner's. Both answer the same prompts with the same
noise, at a learning rate that leaves the answers the same, and replay the same rows.

CPU milliseconds per token of prompts and answers, in steady steps: a run's first step, with its first allocations, is
not counted, nor are loading and saving. One thread; medians of rounds in which all take turns. Packed, the twin is
the bare loop that tuner is measured by; padded, it is how such loops are usually written: right-padded batches in the
rollout's order, as many rows as fit tokens_per_pass, logits at every position. Generation is the same in both.

Answers are ragged: random models end none, so every so many-th token of the vocabulary counts as an end token here.

Memory is the peak of live bytes of torch's allocator (its profiler counts them), in processes of their own: of an SFT
run, and of PPO with the roles shared, both with the same base, adapters and text in full passes. What PPO's is higher
must be what it holds beside the policy: the critic's adapter with gradients and Adam's moments, the adapters of
reference and reward, and two heads. Resident memory would count what the libraries' code takes, and what malloc keeps.
Exits with 1 when a limit is missed.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from report import report, verdict
from transformers import LlamaConfig, LlamaForCausalLM

import tuner
from tests.oracle import flat_ppo
from tuner.config import (
    PPO,
    SFT,
    AdamW,
    Checkpoint,
    Constant,
    Evaluation,
    LoRA,
    Model,
    PolicyEvaluation,
    Preferences,
    Prompts,
    Replay,
    RewardModel,
    Sampling,
    Text,
    override,
)
from tuner.models.load import load_tokenizer
from tuner.models.scorer import ScoreRequest
from tuner.models.tiny import tiny_model_folder
from tuner.resources import locate
from tuner.training.step import Step

TWIN, PADDED, MEMORY = 1.1, 2.0, 1.05
"""Limits: tuner's step over the twin's at most, the padded twin's scoring and updates over tuner's at least, memory
above SFT's over what the other roles hold at most."""
PARTS = ("generate", "logprobs", "scores", "rewards", "advantages", "updates")
PACKED_PARTS = ("logprobs", "scores", "updates")
"""Where rows are padded or not."""
COMPARED = ("whole step", "generate", *PACKED_PARTS)
"""Of tuner and the twin; the other parts take no time worth a figure."""
PASS, TEXT, RANK = 4_096, 256, 16
"""Tokens of a pass and at most of a row of text, and rank of the adapters, where time is measured."""
HELD_PASS, HELD_RANK, HELD_STEPS = 2_048, 64, 2
"""Where memory is: large adapters beside a pass; Adam's moments are there from the second step on."""
HIDDEN, LAYERS, VOCABULARY = 384, 6, 8_192
"""Of the random Llama."""


@dataclass(frozen=True)
class Kind:
    """What models of a kind are asked with."""

    template: str
    reward_token: str
    ends: frozenset[int]
    """Tokens that end an answer, so many that answers are ragged."""
    steps: int
    """Steps that are counted in a round, after a first one that is not."""


KINDS = {
    "tiny": Kind("internlm2", "[UNUSED_TOKEN_130]", frozenset(range(300, 2_048, 12)), steps=2),
    "nano": Kind("llama3", "<|finetune_right_pad_id|>", frozenset(range(300, VOCABULARY, 110)), steps=1),
}


@dataclass(frozen=True)
class Case:
    """A base with what PPO starts from."""

    name: str
    base: str
    config: PPO

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


@dataclass
class Cost:
    """CPU seconds of the counted steps of a run, and what they were spent on."""

    whole: float
    parts: dict[str, float]
    tokens: int
    """Of the prompts and their answers."""
    answers: list[list[int]]
    lengths: list[list[int]]
    """Of each step's prompts with their answers, in the rollout's order."""

    def of(self, *parts: str) -> float:
        """Milliseconds per token of the whole step, or of some parts together."""
        seconds = self.whole if parts == ("whole step",) else sum(self.parts[part] for part in parts)
        return seconds / self.tokens * 1e3


# What is trained on


def words() -> list[str]:
    """Python's own reference manual."""
    from pydoc_data.topics import topics

    return " ".join(topics.values()).split()


def write_rows(folder: Path) -> None:
    """Prompts and pairs with a long tail of lengths, and text."""
    every, generator = words(), np.random.default_rng(0)

    def text(typical: int, most: int) -> str:
        length = int(np.clip(generator.lognormal(np.log(typical), 0.8), 2, most))
        start = int(generator.integers(0, len(every) - most))
        return " ".join(every[start : start + length])

    names = ("prompt", "chosen", "rejected")
    rows = {
        "pairs": [{name: text(12, 60) for name in names} for _ in range(400)],
        "text": [{"text": text(20, 150)} for _ in range(400)],
        "long": [{"text": " ".join(every[:40_000])}],
    }
    for name, of_file in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in of_file)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def nano(folder: Path) -> str:
    """A random Llama in a folder of that name, with a tokenizer of as many tokens as it knows."""
    folder = folder / "nano"
    if folder.exists():
        return str(folder)
    tiny_model_folder("org/llama", folder)
    small = load_tokenizer(Model(path=str(folder)))
    tokenizer = small.train_new_from_iterator([" ".join(words())], vocab_size=VOCABULARY, show_progress=False)
    tokenizer.chat_template = small.chat_template
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=1_024,
            num_hidden_layers=LAYERS,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=4_096,
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.lm_head.weight.data *= 2  # far from uniform, so that rounding seldom draws another token
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sft(base: str, name: str, file: Path, changes: dict[str, Any]) -> SFT:
    """A step on raw text."""
    config = SFT(
        name=name,
        model=Model(path=base),
        adapter=LoRA(r=RANK),
        data=Text(files=(str(file),), max_length=TEXT),
        optimizer=AdamW(lr=1e-3),
        tokens_per_step=PASS,
        tokens_per_pass=PASS,
        max_steps=1,
        precision="fp32",
        gradient_checkpointing=False,
        evaluation=Evaluation(samples=0),
    )
    return override(config, changes)


def make_case(name: str, folder: Path, changes: dict[str, Any] | None = None) -> Case:
    """A case by its name, its starts trained for a step; `folder` keeps them. changes: of all three configs."""
    kind, changes = KINDS[name], changes or {}
    base = nano(folder) if name == "nano" else "tuner:tiny"
    rank = changes.pop("adapter.r", RANK)
    policy = sft(base, f"{name}_sft_{rank}", folder / "text.jsonl", changes | {"adapter.r": rank})
    reward = RewardModel(
        name=f"{name}_reward_{rank}",
        model=Model(path=base),
        adapter=LoRA(r=rank),
        reward_token=kind.reward_token,
        data=Preferences(files=(str(folder / "pairs.jsonl"),), template=kind.template, max_length=1_024),
        optimizer=AdamW(lr=1e-3),
        tokens_per_step=PASS,
        tokens_per_pass=PASS,
        max_steps=1,
        precision="fp32",
        gradient_checkpointing=False,
    )
    for start in (policy, override(reward, changes)):
        with quiet():
            tuner.train(start, runs=folder)
    config = PPO(
        name="bench",
        policy=Model(path=str(folder / f"{name}_sft_{rank}")),
        reward=str(folder / f"{name}_reward_{rank}"),
        prompts=Prompts(files=(str(folder / "pairs.jsonl"),), template=kind.template, max_length=256),
        prompts_per_step=32,
        sampling=Sampling(max_new_tokens=256),
        mini_batches=2,
        critic_warmup=0,
        critic_lr=1e-6,
        optimizer=AdamW(lr=1e-7),
        schedule=Constant(warmup=0),
        replay=Replay(files=(str(folder / "text.jsonl"),), max_length=TEXT),
        tokens_per_pass=PASS,
        precision="fp32",
        gradient_checkpointing=False,
        checkpoint=Checkpoint(every=None),
        evaluation=PolicyEvaluation(samples=0),
    )
    return Case(name, base, override(config, changes))


# Runs


@contextlib.contextmanager
def replaced(place: Any, name: str, made: Any) -> Iterator[None]:
    """Another function under a name, for a while."""
    before = getattr(place, name)
    setattr(place, name, made)
    try:
        yield
    finally:
        setattr(place, name, before)


class Watched:
    """What is seen of tuner's steps on their way: CPU seconds of their parts and ends, and their answers."""

    def __init__(self, end_ids: frozenset[int]) -> None:
        self.end_ids = end_ids
        self.made: Any = None
        self.finished: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.rollouts: list[Any] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        stage, preparing = (
            importlib.import_module(f"tuner.stages.rl.{name}") for name in ("loop", "prepare")
        )
        prepare, answer, finish = stage.prepare, stage.answer_prompts, Step.finish

        def prepared(*args: Any) -> Any:
            self.made = prepare(*args)
            return self.made

        def answered(*args: Any, **settings: Any) -> Any:
            self.rollouts.append(answer(*args, **settings))
            return self.rollouts[-1]

        @contextlib.contextmanager
        def part(step: Step, name: str) -> Iterator[None]:
            if len(self.parts) == step.index:
                self.parts.append({})
            start = time.process_time()
            yield
            self.parts[step.index][name] = time.process_time() - start

        def finished(step: Step) -> None:
            finish(step)
            self.finished.append(time.process_time())

        with contextlib.ExitStack() as stack:
            for place, name, made in (
                (stage, "prepare", prepared),
                (stage, "answer_prompts", answered),
                (preparing, "end_ids", lambda *_: self.end_ids),
                (Step, "part", part),
                (Step, "finish", finished),
            ):
                stack.enter_context(replaced(place, name, made))
            yield

    @property
    def cost(self) -> Cost:
        """Of all steps but the first."""
        counted = range(1, len(self.finished))
        rollouts = [self.rollouts[step] for step in counted]
        return Cost(
            whole=self.finished[-1] - self.finished[0],
            parts={name: sum(self.parts[step][name] for step in counted) for name in PARTS},
            tokens=sum(int(rollout.lengths.sum()) for rollout in rollouts),
            answers=[answer.tokens.tolist() for rollout in rollouts for answer in rollout.answers],
            lengths=[rollout.lengths.tolist() for rollout in rollouts],
        )


def run_tuner(case: Case) -> Watched:
    """A whole run, folder and all."""
    watched = Watched(case.kind.ends)
    config = override(case.config, {"max_steps": case.kind.steps + 1})
    with tempfile.TemporaryDirectory() as runs, watched.watching(), quiet():
        tuner.train(config, runs=runs)
    return watched


def run_twin(case: Case, made: Any, *, packed: bool) -> Cost:
    """The same steps of the twin. made: what tuner's run was prepared with, for prompts, rows and texts."""
    settings = twin_settings(case, packed)
    prompts = [made.stream.prompts.tokens(number).tolist() for number in range(len(made.stream.prompts))]
    examples = made.replay.examples
    replay = [tuple(part.tolist() for part in examples.example(number)) for number in range(len(examples))]
    begins: list[float] = []
    generate = flat_ppo.generate

    def score(numbers: list[int], answers: list[list[int]]) -> list[list[int]]:
        asked = []
        for number, answer in zip(numbers, answers, strict=True):
            said = answer[:-1] if answer[-1] in case.kind.ends else answer
            prompt = made.stream.prompts.prompt(number)
            text = made.roles.tokenizer.decode(said, skip_special_tokens=False)
            asked.append(ScoreRequest(prompt.with_answer(text), prompt.condition, prompt.turns))
        return [tokens.tolist() for tokens in made.sequences.make(asked)]

    def generating(*args: Any) -> Any:
        begins.append(time.process_time())
        return generate(*args)

    with replaced(flat_ppo, "generate", generating), quiet():
        roles = flat_ppo.load_roles(settings)
        steps = flat_ppo.train(settings, prompts, score, replay, roles)[1:]
        end = time.process_time()
    spent = {name: sum(step[f"cpu_seconds/{name}"] for step in steps) for name in (*PARTS, "render")}
    spent["scores"] += spent.pop("render")
    return Cost(
        whole=end - begins[1],
        parts=spent,
        tokens=sum(step["tokens"] for step in steps),
        answers=list(itertools.chain.from_iterable(step["answers"] for step in steps)),
        lengths=[
            [
                len(prompts[number]) + len(answer)
                for number, answer in zip(step["prompts"], step["answers"], strict=True)
            ]
            for step in steps
        ],
    )


def twin_settings(case: Case, packed: bool) -> flat_ppo.Settings:
    """A config in the twin's words."""
    config = case.config
    assert config.replay is not None
    names = {one.name for one in fields(flat_ppo.Settings)}
    given = {name: getattr(config, name) for name in names if hasattr(config, name)}
    given |= {name: getattr(config.sampling, name) for name in ("max_new_tokens", "temperature", "top_p")}
    given |= {name: getattr(config.optimizer, name) for name in ("lr", "betas", "eps", "weight_decay")}
    return flat_ppo.Settings(
        **given
        | {
            "base": locate(case.base),
            "policy": str(Path(config.policy.path, "model")),
            "reward": str(Path(config.reward.path, "model")),
            "steps": case.kind.steps + 1,
            "end_ids": tuple(case.kind.ends),
            "replay_coefficient": config.replay.coefficient,
            "replay_ratio": config.replay.ratio,
            "packed": packed,
        }
    )


# Memory


def held_configs(folder: Path) -> tuple[SFT, PPO]:
    """Two runs whose passes are full of the same text: rows of exactly TEXT tokens, and answers that fill no more."""
    shape = {"tokens_per_pass": HELD_PASS, "gradient_checkpointing": True, "adapter.r": HELD_RANK}
    case = make_case("nano", folder, dict(shape))
    long = folder / "long.jsonl"
    alone = sft(case.base, "held_sft", long, shape | {"max_steps": HELD_STEPS})
    changes = {
        "max_steps": HELD_STEPS,
        "prompts.max_length": 96,
        "sampling.max_new_tokens": TEXT - 96,
        "prompts_per_step": 24,
        "mini_batches": 1,
        "replay.files": [str(long)],
        "replay.ratio": 1.0,
    }
    return alone, override(case.config, changes)


def held(way: str, folder: Path) -> dict[str, float]:
    """Most live MB of a run, and for PPO of what its roles hold beside the policy; for a process of its own."""
    alone, together = held_configs(folder)
    watched = Watched(frozenset())
    recording = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with tempfile.TemporaryDirectory() as runs, watched.watching(), quiet(), recording as profiler:
        tuner.train(alone if way == "sft" else together, runs=runs)
    found = {"peak": peak(profiler) / 1e6}
    if way == "ppo":
        found |= {name: size / 1e6 for name, size in of_roles(watched.made.roles).items()}
    return found


def peak(profiler: Any) -> int:
    """Most bytes that were live at a time."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def of_roles(roles: Any) -> dict[str, int]:
    """Bytes of the critic's trained weights with their gradients and Adam's two moments, and of what is frozen."""
    model = roles.loaded.model
    adapters = {
        name: sum(w.nbytes for n, w in model.named_parameters() if f".{name}." in n)
        for name in ("reference", "reward")
    }
    critic = sum(weight.nbytes for weight in roles.trained("critic").values())
    return {"critic": 4 * critic, "frozen": sum(adapters.values()) + roles["reward"].head.weight.nbytes}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither tuner's lines nor the libraries' bars and advice."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# What is reported


def compare(case: Case, rounds: int) -> tuple[list[list[str]], list[str]]:
    """The rows of one case, and what a reader has to know of it."""
    costs: list[tuple[Cost, Cost, Cost]] = []
    for _ in range(rounds):
        watched = run_tuner(case)
        twins = (run_twin(case, watched.made, packed=packed) for packed in (True, False))
        costs.append((watched.cost, *twins))
    rows = [
        line(
            f"{case.name}, {name}: tuner / twin",
            [(own.of(name), twin.of(name)) for own, twin, _ in costs],
            TWIN,
        )
        for name in COMPARED
    ]
    rows.append(
        line(
            f"{case.name}, scoring and updates: padded twin / tuner",
            [(padded.of(*PACKED_PARTS), own.of(*PACKED_PARTS)) for own, _, padded in costs],
            PADDED,
            least=True,
        )
    )
    return rows, [describe(case, *costs[0])]


def line(title: str, pairs: list[tuple[float, float]], limit: float, *, least: bool = False) -> list[str]:
    """A row: medians of two figures over the rounds, and of their ratio, and whether that is within its limit."""
    ratio = statistics.median(first / second for first, second in pairs)
    shown = (f"{statistics.median(figures):.3f}" for figures in zip(*pairs, strict=True))
    return [
        title,
        *shown,
        f"{ratio:.2f}",
        f"{'≥' if least else '≤'} {limit:.2f}",
        verdict(ratio, limit, least=least),
    ]


def describe(case: Case, own: Cost, twin: Cost, padded: Cost) -> str:
    """How ragged the answers are, what padding that makes, and that they are the same in all three."""
    lengths = [len(answer) for answer in own.answers]
    filled, held = 0, 0
    for step in own.lengths:
        filled += sum(step)
        held += sum(
            len(group) * max(step[place] for place in group)
            for group in flat_ppo.padded_groups(step, case.config.tokens_per_pass)
        )
    alike = min(
        np.mean([a == b for a, b in zip(own.answers, other.answers, strict=True)]) for other in (twin, padded)
    )
    quarter, half, three_quarters = np.percentile(lengths, (25, 50, 75))
    return (
        f"{case.name}: {case.config.prompts_per_step} prompts a step; answers of {np.mean(lengths):.0f} tokens on "
        f"average (quartiles {quarter:.0f}, {half:.0f} and {three_quarters:.0f}, longest {max(lengths)}), prompts "
        f"of {np.mean(own.lengths) - np.mean(lengths):.0f}; "
        f"{1 - filled / held:.0%} of what the padded twin computes of them is padding; {alike:.0%} of the answers are "
        "the same token for token."
    )


def compare_memory(folder: Path) -> list[str]:
    """The row of memory."""
    found = {}
    for way in ("sft", "ppo"):
        command = [sys.executable, __file__, "--one", way, str(folder)]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = json.loads(ran.stdout.splitlines()[-1])
    above = found["ppo"]["peak"] - found["sft"]["peak"]
    pair = above, found["ppo"]["critic"] + found["ppo"]["frozen"]
    return line("nano, MB: peak above SFT's / critic's state and frozen adapters", [pair], MEMORY)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/ppo_cost.md")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(held(options.one[0], Path(options.one[1]))))
        return 0

    table, notes = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder)
        for name in KINDS:
            rows, said = compare(make_case(name, folder), options.rounds)
            table, notes = table + rows, notes + said
        table.append(compare_memory(folder))
    counted = " and ".join(f"{kind.steps} of {name}" for name, kind in KINDS.items())
    report(
        "ppo_cost",
        "PPO: CPU ms per token of prompts and answers, and memory",
        ["", "first", "second", "ratio", "limit", "within"],
        table,
        notes=[
            f"Steady steps (a run's first is not counted; {counted} in a round), two "
            "mini-batches and replay at half of the rollout's tokens "
            f"in passes of {PASS:,}, fp32, LoRA r={RANK}; median of {options.rounds} rounds in which all take turns. "
            "tuner's log-probabilities come with entropies, which the twin does not compute.",
            f"tiny is tuner:tiny; nano a random Llama, hidden {HIDDEN}, {LAYERS} layers, vocabulary {VOCABULARY:,}.",
            *notes,
            f"Memory: peaks of live bytes of torch's allocator, nano with r={HELD_RANK}, checkpointed activations, "
            f"full passes of {HELD_PASS:,} tokens in both, in processes of their own; they are the same in every run.",
        ],
        packages=("torch", "transformers", "peft"),
        write=options.write,
    )
    return int(any(row[-1] == "NO" for row in table))


if __name__ == "__main__":
    sys.exit(main())
