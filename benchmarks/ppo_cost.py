"""Cost of a PPO step: tuner and the flat twin of the tests, packed and padded, and the memory of the roles.

    python benchmarks/ppo_cost.py [--rounds 3] [--write]

The twin (tests/oracle/flat_ppo.py) is PPO in a single file: one frozen base, four adapters, no run folder, no health
metrics. tests/oracle/test_ppo.py shows that its numbers equal tuner's. Both answer the same prompts with the same
noise, at a learning rate too low to change the answers, and replay the same rows.

CPU milliseconds per token of prompts and answers, in steady state: a run's first step, with its first allocations, does
not count, nor do loading and saving. One thread; medians of rounds in which all alternate. The packed twin is the bare
loop that tuner is compared with; the padded twin is the usual implementation: right-padded batches in the rollout's
order, as many rows as fit tokens_per_pass, logits at every position. Generation is the same in both.

Answers have different lengths: random models never end one, so every n-th token of the vocabulary is an end token here.

Memory is the peak of live bytes in torch's allocator, from its profiler, in processes of their own: of an SFT run, and
of PPO with shared roles, both with the same base, adapters and full passes of text. The difference must be what PPO
holds in addition to the policy: the critic's adapter with gradients and Adam's moments, the adapters of reference and
reward model, and two heads. Resident memory would include the libraries' code and malloc's unreturned memory.
Exits with 1 if a limit is missed.
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
"""Limits: step of tuner / twin (maximum), scoring and updates of padded twin / tuner (minimum), memory above SFT's /
memory of the other roles (maximum)."""
PARTS = ("generate", "logprobs", "scores", "rewards", "advantages", "updates")
PACKED_PARTS = ("logprobs", "scores", "updates")
"""Parts in which padding matters."""
COMPARED = ("whole step", "generate", *PACKED_PARTS)
"""Parts compared between tuner and the twin; the others take negligible time."""
PASS, TEXT, RANK = 4_096, 256, 16
"""For time: tokens in a pass, maximum tokens in a row of text, and rank of the adapters."""
MEMORY_PASS, MEMORY_RANK, MEMORY_STEPS = 2_048, 64, 2
"""For memory: adapters are large relative to a pass, and Adam's moments exist from the second step on."""
HIDDEN, LAYERS, VOCABULARY = 384, 6, 8_192
"""Shape of the random Llama."""


@dataclass(frozen=True)
class Kind:
    """Template, tokens and step count for a kind of model."""

    template: str
    reward_token: str
    ends: frozenset[int]
    """Tokens that end an answer, enough of them for answers of different lengths."""
    steps: int
    """Counted steps per round, after an uncounted first one."""


KINDS = {
    "tiny": Kind("internlm2", "[UNUSED_TOKEN_130]", frozenset(range(300, 2_048, 12)), steps=2),
    "nano": Kind("llama3", "<|finetune_right_pad_id|>", frozenset(range(300, VOCABULARY, 110)), steps=1),
}


@dataclass(frozen=True)
class Case:
    """A base model, and a PPO config on trained starting points."""

    name: str
    base: str
    config: PPO

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


@dataclass
class Cost:
    """CPU seconds of the counted steps of a run, in total and by part."""

    whole: float
    parts: dict[str, float]
    tokens: int
    """Number of tokens of prompts and answers."""
    answers: list[list[int]]
    lengths: list[list[int]]
    """Lengths of each step's prompts with their answers, in the rollout's order."""

    def per_token(self, *parts: str) -> float:
        """Milliseconds per token of the whole step, or of the sum of some parts."""
        seconds = self.whole if parts == ("whole step",) else sum(self.parts[part] for part in parts)
        return seconds / self.tokens * 1e3


# Data, models and configs


def words() -> list[str]:
    """The words of Python's reference manual."""
    from pydoc_data.topics import topics

    return " ".join(topics.values()).split()


def write_rows(folder: Path) -> None:
    """Write prompts and pairs with a long tail of lengths, and text."""
    all_words, generator = words(), np.random.default_rng(0)

    def text(median: int, maximum: int) -> str:
        length = int(np.clip(generator.lognormal(np.log(median), 0.8), 2, maximum))
        start = int(generator.integers(0, len(all_words) - maximum))
        return " ".join(all_words[start : start + length])

    names = ("prompt", "chosen", "rejected")
    rows = {
        "pairs": [{name: text(12, 60) for name in names} for _ in range(400)],
        "text": [{"text": text(20, 150)} for _ in range(400)],
        "long": [{"text": " ".join(all_words[:40_000])}],
    }
    for name, file_rows in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in file_rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def nano(folder: Path) -> str:
    """Create a random Llama, with a tokenizer trained to the size of its vocabulary."""
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
    model.lm_head.weight.data *= 2  # far from uniform, so that rounding rarely changes a sampled token
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sft(base: str, name: str, file: Path, changes: dict[str, Any]) -> SFT:
    """Config of an SFT run on raw text, by default of one step."""
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
    """Train policy and reward model for one step each, kept in `folder`. changes: overrides of all three configs."""
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
    for run_config in (policy, override(reward, changes)):
        with quiet():
            tuner.train(run_config, runs=folder)
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
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute temporarily."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


class Recorder:
    """Records CPU seconds and rollouts of the steps of a tuner run."""

    def __init__(self, end_ids: frozenset[int]) -> None:
        self.end_ids = end_ids
        self.setup: Any = None
        self.finish_seconds: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.rollouts: list[Any] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        loop, preparation = (
            importlib.import_module(f"tuner.stages.rl.{name}") for name in ("loop", "prepare")
        )
        prepare, answer_prompts, finish = loop.prepare, loop.answer_prompts, Step.finish

        def recorded_prepare(*args: Any) -> Any:
            self.setup = prepare(*args)
            return self.setup

        def recorded_answers(*args: Any, **settings: Any) -> Any:
            self.rollouts.append(answer_prompts(*args, **settings))
            return self.rollouts[-1]

        @contextlib.contextmanager
        def recorded_part(step: Step, name: str) -> Iterator[None]:
            if len(self.parts) == step.index:
                self.parts.append({})
            start = time.process_time()
            yield
            self.parts[step.index][name] = time.process_time() - start

        def recorded_finish(step: Step) -> None:
            finish(step)
            self.finish_seconds.append(time.process_time())

        with contextlib.ExitStack() as stack:
            for owner, name, replacement in (
                (loop, "prepare", recorded_prepare),
                (loop, "answer_prompts", recorded_answers),
                (preparation, "end_ids", lambda *_: self.end_ids),
                (Step, "part", recorded_part),
                (Step, "finish", recorded_finish),
            ):
                stack.enter_context(replaced(owner, name, replacement))
            yield

    @property
    def cost(self) -> Cost:
        """Cost of all steps but the first."""
        counted = range(1, len(self.finish_seconds))
        rollouts = [self.rollouts[step] for step in counted]
        return Cost(
            whole=self.finish_seconds[-1] - self.finish_seconds[0],
            parts={name: sum(self.parts[step][name] for step in counted) for name in PARTS},
            tokens=sum(int(rollout.lengths.sum()) for rollout in rollouts),
            answers=[answer.tokens.tolist() for rollout in rollouts for answer in rollout.answers],
            lengths=[rollout.lengths.tolist() for rollout in rollouts],
        )


def run_tuner(case: Case) -> Recorder:
    """Record a whole run."""
    recorder = Recorder(case.kind.ends)
    config = override(case.config, {"max_steps": case.kind.steps + 1})
    with tempfile.TemporaryDirectory() as runs, recorder.recording(), quiet():
        tuner.train(config, runs=runs)
    return recorder


def run_twin(case: Case, setup: Any, *, packed: bool) -> Cost:
    """Run the same steps with the twin. setup: that of tuner's run, for its prompts, replay rows and reward inputs."""
    settings = twin_settings(case, packed)
    prompt_set = setup.stream.prompts
    prompts = [prompt_set.tokens(number).tolist() for number in range(len(prompt_set))]
    examples = setup.replay.examples
    replay = [tuple(part.tolist() for part in examples.example(number)) for number in range(len(examples))]
    start_seconds: list[float] = []
    generate = flat_ppo.generate

    def score(numbers: list[int], answers: list[list[int]]) -> list[list[int]]:
        requests = []
        for number, answer in zip(numbers, answers, strict=True):
            without_end = answer[:-1] if answer[-1] in case.kind.ends else answer
            text = setup.roles.tokenizer.decode(without_end, skip_special_tokens=False)
            requests.append(ScoreRequest.of(prompt_set.prompt(number), text))
        return [tokens.tolist() for tokens in setup.reward.inputs.make(requests)]

    def timed_generate(*args: Any) -> Any:
        start_seconds.append(time.process_time())
        return generate(*args)

    with replaced(flat_ppo, "generate", timed_generate), quiet():
        roles = flat_ppo.load_roles(settings)
        steps = flat_ppo.train(settings, prompts, score, replay, roles)[1:]
        end = time.process_time()
    parts = {name: sum(step[f"cpu_seconds/{name}"] for step in steps) for name in (*PARTS, "render")}
    parts["scores"] += parts.pop("render")
    return Cost(
        whole=end - start_seconds[1],
        parts=parts,
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
    """The twin's settings for a case."""
    config = case.config
    assert config.replay is not None
    names = {field.name for field in fields(flat_ppo.Settings)}
    settings = {name: getattr(config, name) for name in names if hasattr(config, name)}
    settings |= {name: getattr(config.sampling, name) for name in ("max_new_tokens", "temperature", "top_p")}
    settings |= {name: getattr(config.optimizer, name) for name in ("lr", "betas", "eps", "weight_decay")}
    return flat_ppo.Settings(
        **settings
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


def memory_configs(folder: Path) -> tuple[SFT, PPO]:
    """SFT and PPO with full passes of the same text: rows of exactly TEXT tokens, and answers that are no longer."""
    shape = {"tokens_per_pass": MEMORY_PASS, "gradient_checkpointing": True, "adapter.r": MEMORY_RANK}
    case = make_case("nano", folder, dict(shape))
    long = folder / "long.jsonl"
    sft_config = sft(case.base, "memory_sft", long, shape | {"max_steps": MEMORY_STEPS})
    changes = {
        "max_steps": MEMORY_STEPS,
        "prompts.max_length": 96,
        "sampling.max_new_tokens": TEXT - 96,
        "prompts_per_step": 24,
        "mini_batches": 1,
        "replay.files": [str(long)],
        "replay.ratio": 1.0,
    }
    return sft_config, override(case.config, changes)


def measure_memory(stage: str, folder: Path) -> dict[str, float]:
    """Peak of live MB of a run, and for PPO the MB of its other roles. To be called in a process of its own."""
    sft_config, ppo_config = memory_configs(folder)
    recorder = Recorder(frozenset())
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with tempfile.TemporaryDirectory() as runs, recorder.recording(), quiet(), profile as profiler:
        tuner.train(sft_config if stage == "sft" else ppo_config, runs=runs)
    megabytes = {"peak": peak(profiler) / 1e6}
    if stage == "ppo":
        megabytes |= {name: size / 1e6 for name, size in role_bytes(recorder.setup.roles).items()}
    return megabytes


def peak(profiler: Any) -> int:
    """Peak of live bytes."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def role_bytes(roles: Any) -> dict[str, int]:
    """Bytes of the critic's trained weights with gradients and Adam's two moments, and of the frozen roles."""
    model = roles.loaded.model
    adapters = {
        name: sum(weight.nbytes for parameter, weight in model.named_parameters() if f".{name}." in parameter)
        for name in ("reference", "reward")
    }
    critic = sum(weight.nbytes for weight in roles.trained("critic").values())
    # 4: the weights, their gradients, and Adam's two moments.
    return {"critic": 4 * critic, "frozen": sum(adapters.values()) + roles["reward"].head.weight.nbytes}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of tuner and of libraries."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# Report


def compare(case: Case, rounds: int) -> tuple[list[list[str]], list[str]]:
    """Report rows and notes of a case."""
    costs: list[tuple[Cost, Cost, Cost]] = []
    for _ in range(rounds):
        recorder = run_tuner(case)
        twins = (run_twin(case, recorder.setup, packed=packed) for packed in (True, False))
        costs.append((recorder.cost, *twins))
    rows = [
        line(
            f"{case.name}, {name}: tuner / twin",
            [(tuner_cost.per_token(name), twin.per_token(name)) for tuner_cost, twin, _ in costs],
            TWIN,
        )
        for name in COMPARED
    ]
    rows.append(
        line(
            f"{case.name}, scoring and updates: padded twin / tuner",
            [
                (padded.per_token(*PACKED_PARTS), tuner_cost.per_token(*PACKED_PARTS))
                for tuner_cost, _, padded in costs
            ],
            PADDED,
            least=True,
        )
    )
    return rows, [describe(case, *costs[0])]


def line(title: str, pairs: list[tuple[float, float]], limit: float, *, least: bool = False) -> list[str]:
    """A row of the report: medians of two values and of their ratio, and whether it is within its limit.

    least: whether the limit is a minimum.
    """
    ratio = statistics.median(first / second for first, second in pairs)
    values = (f"{statistics.median(figures):.3f}" for figures in zip(*pairs, strict=True))
    return [
        title,
        *values,
        f"{ratio:.2f}",
        f"{'≥' if least else '≤'} {limit:.2f}",
        verdict(ratio, limit, least=least),
    ]


def describe(case: Case, tuner_cost: Cost, twin: Cost, padded: Cost) -> str:
    """Lengths of the answers, the padding they cause, and the fraction that is identical in all three."""
    lengths = [len(answer) for answer in tuner_cost.answers]
    filled, padded_size = 0, 0
    for step in tuner_cost.lengths:
        filled += sum(step)
        padded_size += sum(
            len(group) * max(step[index] for index in group)
            for group in flat_ppo.padded_groups(step, case.config.tokens_per_pass)
        )
    identical = min(
        np.mean([a == b for a, b in zip(tuner_cost.answers, other.answers, strict=True)])
        for other in (twin, padded)
    )
    quarter, half, three_quarters = np.percentile(lengths, (25, 50, 75))
    return (
        f"{case.name}: {case.config.prompts_per_step} prompts a step; answers of {np.mean(lengths):.0f} tokens on "
        f"average (quartiles {quarter:.0f}, {half:.0f} and {three_quarters:.0f}, longest {max(lengths)}), prompts "
        f"of {np.mean(tuner_cost.lengths) - np.mean(lengths):.0f}; "
        f"{1 - filled / padded_size:.0%} of what the padded twin computes is padding; {identical:.0%} of the answers "
        "are identical token for token."
    )


def compare_memory(folder: Path) -> list[str]:
    """The report row on memory."""
    megabytes = {}
    for stage in ("sft", "ppo"):
        command = [sys.executable, __file__, "--memory", stage, str(folder)]
        completed = subprocess.run(command, check=True, capture_output=True, text=True)
        megabytes[stage] = json.loads(completed.stdout.splitlines()[-1])
    above_sft = megabytes["ppo"]["peak"] - megabytes["sft"]["peak"]
    pair = above_sft, megabytes["ppo"]["critic"] + megabytes["ppo"]["frozen"]
    return line("nano, MB: peak above SFT's / critic's state and frozen adapters", [pair], MEMORY)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/ppo_cost.md")
    parser.add_argument("--memory", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(measure_memory(options.memory[0], Path(options.memory[1]))))
        return 0

    table, notes = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder)
        for name in KINDS:
            rows, case_notes = compare(make_case(name, folder), options.rounds)
            table, notes = table + rows, notes + case_notes
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
            f"Memory: peaks of live bytes of torch's allocator, nano with r={MEMORY_RANK}, checkpointed activations, "
            f"full passes of {MEMORY_PASS:,} tokens in both, in processes of their own; identical in every run.",
        ],
        packages=("torch", "transformers", "peft"),
        write=options.write,
    )
    return int(any(row[-1] == "NO" for row in table))


if __name__ == "__main__":
    sys.exit(main())
