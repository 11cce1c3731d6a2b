"""CPU seconds per trained token of SFT: tuner, a bare torch loop over the same packed rows, and TRL.

By slope between a short and a long run, so that imports and loading do not count; one thread; medians of
interleaved rounds. Exits with 1 when tuner costs more than LIMIT × the bare loop.
    python benchmarks/sft_cost.py [--rounds 3] [--without-trl]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM

import tuner
from tuner.config import SFT, AdamW, Chat, Evaluation, LoRA, Model, override
from tuner.data.stream import Stream
from tuner.models.adapters import add_adapter
from tuner.models.tiny import tiny_model_folder
from tuner.stages.rows import load_rows, plan

LIMIT = 1.05
SHORT, LONG = 2, 10
"""Steps of the two runs whose difference is measured."""


@dataclass(frozen=True)
class Case:
    """One comparison: a model, and whether all weights or an adapter are trained."""

    name: str
    config: SFT
    stream: Stream

    def trained_tokens(self) -> float:
        return sum(self.stream.totals(step)["tokens"] for step in range(SHORT, LONG))


def write_rows(file: Path, count: int = 3000) -> None:
    """Conversations with a long tail of lengths, from Python's own reference manual."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    generator = np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            size, at = (
                int(np.clip(generator.lognormal(4.0, 0.8), 5, 300)),
                generator.integers(0, len(words) - 400),
            )
            question, answer = words[at : at + size // 3 + 1], words[at + size // 3 + 1 : at + size + 1]
            turns = [
                {"role": "user", "content": " ".join(question)},
                {"role": "assistant", "content": " ".join(answer)},
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")


def make_cases(folder: Path) -> list[Case]:
    write_rows(folder / "rows.jsonl")
    nano = tiny_model_folder("org/llama", folder / "nano")
    base = SFT(
        model=Model(path=str(nano)),
        adapter=LoRA(r=16),
        data=Chat(files=(str(folder / "rows.jsonl"),), template="llama3", max_length=2048, too_long="drop"),
        optimizer=AdamW(lr=1e-4),
        tokens_per_step=4_096,
        tokens_per_pass=2_048,
        precision="fp32",
        gradient_checkpointing=False,
        evaluation=Evaluation(samples=0),
    )
    tiny = {"model.path": "tuner:tiny", "data.template": "internlm2"}
    configs = {
        "nano, LoRA": base,
        "nano, full": override(base, {"adapter": None}),
        "tiny, LoRA": override(base, tiny),
        "tiny, full": override(base, tiny | {"adapter": None}),
    }
    return [Case(name, config, plan(config, load_rows(config)[0])) for name, config in configs.items()]


def run_tuner(case: Case, steps: int) -> None:
    with tempfile.TemporaryDirectory() as runs:
        config = override(case.config, {"max_steps": steps, "name": "bench", "checkpoint.every": None})
        tuner.train(config, runs=runs)


def per_segment(module, query, key, value, attention_mask, *, scaling=None, borders=None, **_):
    """One attention call per segment: what the bare loop pays for isolation."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = zip(*(tensor.split(borders, 2) for tensor in (query, key, value)), strict=True)
    out = torch.cat([scaled_dot_product_attention(*part, is_causal=True, scale=scaling) for part in parts], 2)
    return out.transpose(1, 2), None


def run_bare(case: Case, steps: int) -> None:
    """The shortest honest loop: the same rows, logits, cross entropy, AdamW."""
    AttentionInterface.register("bench_per_segment", per_segment)
    path = tuner.resources.locate(case.config.model.path)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="bench_per_segment"
    )
    if case.config.adapter is not None:
        model = add_adapter(model.requires_grad_(False), case.config.adapter, 0)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    for step in range(steps):
        total = case.stream.totals(step)["tokens"]
        for batch in case.stream.batches(step):
            lengths = torch.diff(batch.offsets).tolist()
            logits = model(
                input_ids=batch.tokens_T[None],
                position_ids=batch.positions_T[None],
                use_cache=False,
                borders=lengths,
            ).logits[0]
            labels = torch.full_like(batch.tokens_T, -100)
            labels[batch.learned_N] = batch.tokens_T[batch.learned_N]
            (cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def run_trl(case: Case, steps: int) -> None:
    """TRL's SFTTrainer on the same samples, packed by its own packer at the same budget."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    examples = case.stream.examples
    indices = np.concatenate(
        [case.stream.steps[step].samples for step in range(min(steps + 2, len(case.stream.steps)))]
    )
    rows = [examples.example(index) for index in indices]
    data = Dataset.from_dict(
        {
            "input_ids": [tokens.tolist() for tokens, _ in rows],
            "completion_mask": [(weights > 0).astype(int).tolist() for _, weights in rows],
        }
    )
    path = tuner.resources.locate(case.config.model.path)
    adapter = case.config.adapter
    with tempfile.TemporaryDirectory() as output:
        SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            args=SFTConfig(
                output_dir=output,
                max_steps=steps,
                packing=True,
                packing_strategy="bfd",
                max_length=2048,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=2,
                learning_rate=1e-4,
                bf16=False,
                gradient_checkpointing=False,
                completion_only_loss=True,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                use_cpu=True,
                disable_tqdm=True,
                dataset_num_proc=None,
            ),  # fmt: skip
            train_dataset=data,
            processing_class=load_rows(case.config)[1],
            peft_config=LoraConfig(r=adapter.r, target_modules="all-linear") if adapter is not None else None,
        ).train()


def slope(run: Callable[[Case, int], None], case: Case) -> float:
    """CPU microseconds per trained token of the steps between SHORT and LONG."""

    def seconds(steps: int) -> float:
        start = time.process_time()
        run(case, steps)
        return time.process_time() - start

    short = seconds(SHORT)
    return (seconds(LONG) - short) / case.trained_tokens() * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-trl", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peers: dict[str, Callable[[Case, int], None]] = {"bare": run_bare, "tuner": run_tuner}
    if not options.without_trl:
        peers["trl"] = run_trl
    failed = False
    print(
        f"CPU µs per trained token, {SHORT}→{LONG} steps, median of {options.rounds} rounds, torch {torch.__version__}"
    )
    print(
        f"{'case':<12}"
        + "".join(f"{name:>10}" for name in peers)
        + f"{'tuner/bare':>12}{'limit':>7}{'trl/bare':>10}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in make_cases(Path(folder)):
            for run in peers.values():
                run(case, 1)  # imports and first allocations
            rounds = [{name: slope(run, case) for name, run in peers.items()} for _ in range(options.rounds)]
            cost = {name: statistics.median(one[name] for one in rounds) for name in peers}
            ratio = statistics.median(one["tuner"] / one["bare"] for one in rounds)
            failed |= ratio > LIMIT
            trl = f"{cost['trl'] / cost['bare']:>10.2f}" if "trl" in cost else ""
            print(
                f"{case.name:<12}" + "".join(f"{value:>10.1f}" for value in cost.values())
                + f"{ratio:>12.3f}{LIMIT:>7.2f}{trl}", flush=True
            )  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
