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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
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
    Chat,
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
from tuner.models.scorer import Asked
from tuner.models.tiny import tiny_model_folder
from tuner.resources import locate
from tuner.training.loop import Step

TWIN, PADDED, MEMORY = 1.1, 2.0, 1.05
"""Limits: tuner's step over the twin's at most, the padded twin's scoring and updates over tuner's at least, memory
above SFT's over what the other roles hold at most."""
PARTS = ("generate", "logprobs", "scores", "rewards", "advantages", "updates")
COMPARED = {"whole step": PARTS, "generate": PARTS[:1], "logprobs": PARTS[1:2], "scores": PARTS[2:3], "updates": PARTS[5:]}
PACKED_PARTS = ("logprobs", "scores", "updates")
"""Where rows are padded or not."""
RANK = 64
"""Of the adapters whose memory is compared."""
PASS, TEXT = 4_096, 256
"""Tokens of a pass; of a row of text."""


@dataclass(frozen=True)
class Case:
    """A model with its starts and prompts."""

    name: str
    config: PPO
    base: str
    ends: frozenset[int]
    """Tokens that end an answer."""
    steps: int
    """Steps that are counted, after a first one that is not."""


@dataclass
class Cost:
    """CPU seconds of the counted steps of a run, and what they were spent on."""

    whole: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    tokens: int = 0
    answers: list[list[int]] = field(default_factory=list)

    def of(self, name: str) -> float:
        """Milliseconds per token of the whole step or of a part."""
        seconds = self.whole if name == "whole step" else sum(self.parts[part] for part in COMPARED[name])
        return seconds / self.tokens * 1e3

    @property
    def packed_parts(self) -> float:
        """Milliseconds per token of scoring and updates."""
        return sum(self.parts[part] for part in PACKED_PARTS) / self.tokens * 1e3


# What is trained on


def words() -> list[str]:
    """Python's own reference manual."""
    from pydoc_data.topics import topics

    return " ".join(topics.values()).split()


def write_rows(folder: Path) -> None:
    """Prompts and pairs with a long tail of lengths, and text."""
    every, generator = words(), np.random.default_rng(0)

    def text(most: int) -> str:
        length, at = int(np.clip(generator.lognormal(2.5, 0.8), 2, most)), int(generator.integers(0, len(every) - most))
        return " ".join(every[at : at + length])

    prompts = [{"prompt": text(60), "chosen": text(60), "rejected": text(60)} for _ in range(400)]
    texts = [{"text": text(200)} for _ in range(400)]
    for name, rows in (("pairs", prompts), ("text", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_nano(folder: Path) -> str:
    """A random Llama, hidden 384, 6 layers, vocabulary 8,192, with a tokenizer of as many tokens."""
    tiny_model_folder("org/llama", folder)
    old = load_tokenizer(Model(path=str(folder)))
    tokenizer = old.train_new_from_iterator([" ".join(words())], vocab_size=8_192, show_progress=False)
    tokenizer.chat_template = old.chat_template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8_192,
        hidden_size=384,
        intermediate_size=1_024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4_096,
        initializer_range=0.1,  # wide, so that rounding seldom makes another token
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_case(name: str, folder: Path) -> Case:
    """A case by its name; `folder` keeps what it starts from for the next time."""
    nano = name == "nano"
    base = str(folder / "nano") if nano else "tuner:tiny"
    if nano and not (folder / "nano").exists():
        write_nano(folder / "nano")
    template, reward_token = ("llama3", "<|finetune_right_pad_id|>") if nano else ("internlm2", "[UNUSED_TOKEN_130]")
    shape = {"precision": "fp32", "gradient_checkpointing": False, "tokens_per_pass": PASS}
    starts = (
        SFT(
            name=f"{name}_sft",
            model=Model(path=base),
            adapter=LoRA(r=16),
            data=Text(files=(str(folder / "text.jsonl"),), max_length=TEXT),
            optimizer=AdamW(lr=1e-3),
            tokens_per_step=PASS,
            max_steps=1,
            evaluation=Evaluation(samples=0),
            **shape,
        ),
        RewardModel(
            name=f"{name}_reward",
            model=Model(path=base),
            adapter=LoRA(r=16),
            reward_token=reward_token,
            data=Preferences(files=(str(folder / "pairs.jsonl"),), template=template, max_length=1_024),
            optimizer=AdamW(lr=1e-3),
            tokens_per_step=PASS,
            max_steps=1,
            **shape,
        ),
    )
    for start in starts:
        with quiet():
            tuner.train(start, runs=folder)
    config = PPO(
        name="bench",
        policy=Model(path=str(folder / f"{name}_sft")),
        reward=str(folder / f"{name}_reward"),
        prompts=Prompts(files=(str(folder / "pairs.jsonl"),), template=template, max_length=256),
        prompts_per_step=32,
        sampling=Sampling(max_new_tokens=256),
        mini_batches=2,
        critic_warmup=0,
        critic_lr=1e-6,
        optimizer=AdamW(lr=1e-7),
        schedule=Constant(warmup=0),
        replay=Replay(files=(str(folder / "text.jsonl"),), max_length=TEXT),
        checkpoint={"every": None},
        evaluation=PolicyEvaluation(samples=0),
        **shape,
    )
    first, every = 300, 110 if nano else 12
    vocabulary = 8_192 if nano else 2_048
    return Case(name, config, base, frozenset(range(first, vocabulary, every)), steps=1 if nano else 2)


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

    def __init__(self, case: Case) -> None:
        self.case = case
        self.made: Any = None
        self.ends: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.rollouts: list[Any] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        stage, preparing = (importlib.import_module(f"tuner.stages.{name}") for name in ("ppo", "policy"))
        prepare, answer, finish = stage.prepare, stage.answer_prompts, Step.finish

        def prepared(*args: Any) -> Any:
            self.made = prepare(*args)
            return self.made

        def answered(*args: Any) -> Any:
            self.rollouts.append(answer(*args))
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
            self.ends.append(time.process_time())

        with contextlib.ExitStack() as stack:
            for place, name, made in (
                (stage, "prepare", prepared),
                (stage, "answer_prompts", answered),
                (preparing, "end_ids", lambda *_: self.case.ends),
                (Step, "part", part),
                (Step, "finish", finished),
            ):
                stack.enter_context(replaced(place, name, made))
            yield

    @property
    def cost(self) -> Cost:
        """Of all steps but the first."""
        counted = range(1, len(self.ends))
        rollouts = [self.rollouts[step] for step in counted]
        return Cost(
            whole=self.ends[-1] - self.ends[0],
            parts={name: sum(self.parts[step][name] for step in counted) for name in PARTS},
            tokens=sum(int(rollout.lengths.sum()) for rollout in rollouts),
            answers=[answer.tokens.tolist() for rollout in rollouts for answer in rollout.answers],
        )


def run_tuner(case: Case) -> Watched:
    """A whole run, folder and all."""
    watched = Watched(case)
    config = override(case.config, {"max_steps": case.steps + 1})
    with tempfile.TemporaryDirectory() as runs, watched.watching(), quiet():
        tuner.train(config, runs=runs)
    return watched


def run_twin(case: Case, made: Any, *, packed: bool) -> Cost:
    """The same steps of the twin. made: what tuner's run was prepared with, for prompts, rows and texts."""
    settings = twin_settings(case, packed)
    prompts = [made.prompts.tokens(number).tolist() for number in range(len(made.prompts))]
    examples = made.replay.examples
    replay = [tuple(part.tolist() for part in examples.example(number)) for number in range(len(examples))]
    begins: list[float] = []
    generate = flat_ppo.generate

    def score(numbers: list[int], answers: list[list[int]]) -> list[list[int]]:
        asked = []
        for number, answer in zip(numbers, answers, strict=True):
            said = answer[:-1] if answer[-1] in case.ends else answer
            prompt = made.prompts.prompt(number)
            text = made.roles.tokenizer.decode(said, skip_special_tokens=False)
            asked.append(Asked(prompt.answered(text), prompt.condition, prompt.turns))
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
            "steps": case.steps + 1,
            "end_ids": tuple(case.ends),
            "replay_coefficient": config.replay.coefficient,
            "replay_ratio": config.replay.ratio,
            "packed": packed,
        }
    )


# Memory


def held_configs(folder: Path) -> tuple[SFT, PPO]:
    """Two runs whose passes are full of the same text: rows of exactly TEXT tokens, or answers no longer than those."""
    long = folder / "long.jsonl"
    long.write_text(json.dumps({"text": " ".join(words()[:40_000])}) + "\n", encoding="utf-8")
    case = make_case("nano", folder)
    shape = {"tokens_per_pass": 2_048, "precision": "fp32", "max_steps": 2}
    sft = SFT(
        name="held_sft",
        model=Model(path=case.base),
        adapter=LoRA(r=RANK),
        data=Text(files=(str(long),), max_length=TEXT),
        optimizer=AdamW(lr=1e-5),
        tokens_per_step=4_096,
        evaluation=Evaluation(samples=0),
        **shape,
    )
    reward = RewardModel(
        name="held_reward",
        model=Model(path=case.base),
        adapter=LoRA(r=RANK),
        reward_token="<|finetune_right_pad_id|>",
        data=Preferences(files=(str(folder / "pairs.jsonl"),), template="llama3", max_length=1_024),
        optimizer=AdamW(lr=1e-5),
        tokens_per_step=2_048,
        **shape | {"max_steps": 1},
    )
    for start in (override(sft, {"name": "held_start", "max_steps": 1}), reward):
        with quiet():
            tuner.train(start, runs=folder)
    ppo = override(
        case.config,
        shape
        | {
            "policy.path": str(folder / "held_start"),
            "reward.path": str(folder / "held_reward"),
            "prompts.max_length": 96,
            "sampling.max_new_tokens": TEXT - 96,
            "prompts_per_step": 24,
            "mini_batches": 1,
            "gradient_checkpointing": True,
            "replay.files": [str(long)],
            "replay.ratio": 1.0,
        },
    )
    return sft, ppo


def held(way: str, folder: Path) -> dict[str, float]:
    """Most live MB of a run, and for PPO of what its roles hold beside the policy; for a process of its own."""
    sft, ppo = held_configs(folder)
    watched = Watched(Case("held", ppo, "", frozenset(), 0))
    recorded = [torch.profiler.ProfilerActivity.CPU]
    with tempfile.TemporaryDirectory() as runs, watched.watching(), quiet():
        with torch.profiler.profile(activities=recorded, profile_memory=True) as profiler:
            tuner.train(sft if way == "sft" else ppo, runs=runs)
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
    adapters = {name: sum(w.nbytes for n, w in model.named_parameters() if f".{name}." in n) for name in ("reference", "reward")}
    critic = sum(weight.nbytes for weight in roles.trained("critic").values())
    return {"critic": 4 * critic, "frozen": sum(adapters.values()) + roles["reward"].head.weight.nbytes}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither tuner's lines nor the libraries' bars and advice."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
