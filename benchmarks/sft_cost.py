"""Cost of SFT per trained token: tuner, a bare torch loop over the same packed rows, and TRL.

    python benchmarks/sft_cost.py [--rounds 3] [--without-trl] [--write]

CPU microseconds, as the difference between a short and a long run over the tokens trained in between, so that imports,
loading and saving do not count; one thread; medians of rounds in which tuner and the bare loop alternate. The bare loop
has one attention call per segment, full logits and cross-entropy. TRL trains on the same samples, packed by its own
packer ("bfd") with the same budget and sdpa attention, which isolates them (tests/oracle/test_trl.py shows that its
packed loss equals ours); the tokens it trains on are counted. Exits with 1 if tuner costs more than 1.05 × the bare
loop.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from report import report, verdict
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM

import tuner
import tuner.resources
from tuner.config import SFT, AdamW, Chat, Evaluation, LoRA, Model, override
from tuner.data.stream import Stream
from tuner.models.adapters import add_adapter
from tuner.models.load import load_tokenizer
from tuner.models.tiny import tiny_model_folder
from tuner.stages.data_view import load_rows
from tuner.stages.packed_rows import plan
from tuner.stages.run import Run

LIMIT = 1.05


@dataclass(frozen=True)
class Case:
    """A comparison: a model, trained in full or with an adapter."""

    name: str
    config: SFT
    stream: Stream
    short: int
    """Steps of the two runs whose difference is measured: more where a step is fast."""
    long: int

    def tokens(self, steps: int) -> float:
        """Tokens trained on in the first steps."""
        return sum(self.stream.totals(step)["tokens"] for step in range(steps))


def write_rows(file: Path, count: int = 3000) -> None:
    """Write conversations with a long tail of lengths, from Python's reference manual."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    generator = np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            size = int(np.clip(generator.lognormal(4.0, 0.8), 5, 300))
            start = generator.integers(0, len(words) - 400)
            middle = start + size // 3 + 1
            question, answer = words[start:middle], words[middle : start + size + 1]
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
    cases = {
        "nano, LoRA": (base, 2, 14),
        "nano, full": (override(base, {"adapter": None}), 2, 14),
        "tiny, LoRA": (override(base, tiny), 1, 3),
        "tiny, full": (override(base, tiny | {"adapter": None}), 1, 3),
    }
    return [
        Case(name, config, plan(config, load_rows(config)), *steps)
        for name, (config, *steps) in cases.items()
    ]


def run_tuner(case: Case, steps: int) -> float:
    """A whole run with its folder; returns the tokens trained on, as do the other functions."""
    with tempfile.TemporaryDirectory() as runs:
        metrics = train_tuner(case, steps, Path(runs)).metrics
    assert len(metrics) == steps
    return case.tokens(steps)


def train_tuner(case: Case, steps: int, runs: Path) -> Run:
    config = override(case.config, {"max_steps": steps, "name": "bench", "checkpoint.every": None})
    return tuner.train(config, runs=runs)


def per_segment(module, query, key, value, attention_mask, *, scaling=None, segment_lengths=None, **_):
    """One attention call per segment: the bare loop's isolation."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = zip(*(tensor.split(segment_lengths, 2) for tensor in (query, key, value)), strict=True)
    out = torch.cat([scaled_dot_product_attention(*part, is_causal=True, scale=scaling) for part in parts], 2)
    return out.transpose(1, 2), None


def run_bare(case: Case, steps: int) -> float:
    """A minimal training loop: the same rows, full logits, cross-entropy, AdamW."""
    AttentionInterface.register("bench_per_segment", per_segment)
    path = tuner.resources.locate(case.config.model.path)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="bench_per_segment"
    )
    if case.config.adapter is not None:
        model = add_adapter(model.requires_grad_(False), case.config.adapter, 0)
    model.train()
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=1e-4, fused=True
    )
    for step in range(steps):
        total = case.stream.totals(step)["tokens"]
        for batch in case.stream.batches(step):
            lengths = torch.diff(batch.offsets).tolist()
            logits = model(
                input_ids=batch.tokens_T[None],
                position_ids=batch.positions_T[None],
                use_cache=False,
                segment_lengths=lengths,
            ).logits[0]
            labels = torch.full_like(batch.tokens_T, -100)
            labels[batch.learned_N] = batch.tokens_T[batch.learned_N]
            (cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return case.tokens(steps)


def run_trl(case: Case, steps: int) -> float:
    """TRL's SFTTrainer on the same samples, with as many packed rows per step as tuner has passes."""
    from accelerate import PartialState
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    class Counting(SFTTrainer):
        """Counts the tokens the loss is taken on."""

        trained = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.trained += int((inputs["labels"][:, 1:] != -100).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    config, adapter = case.config, case.config.adapter
    samples = [index for step in range(case.long + 2) for index in case.stream.steps[step].samples]
    rows = [case.stream.examples.example(index) for index in samples]
    data = Dataset.from_dict(
        {
            "input_ids": [tokens.tolist() for tokens, _ in rows],
            "labels": [np.where(weights > 0, tokens, -100).tolist() for tokens, weights in rows],
        }
    )
    path = tuner.resources.locate(config.model.path)
    with tempfile.TemporaryDirectory() as output:
        trainer = Counting(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa"),
            args=SFTConfig(
                output_dir=output,
                max_steps=steps,
                packing=True,
                packing_strategy="bfd",
                max_length=config.tokens_per_pass,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=config.tokens_per_step
                // config.tokens_per_pass
                // PartialState().num_processes,
                learning_rate=1e-4,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=data,
            processing_class=load_tokenizer(case.config.model),
            peft_config=LoraConfig(r=adapter.r, target_modules="all-linear") if adapter is not None else None,
        )
        trainer.train()
    assert trainer.state.global_step == steps
    return float(trainer.trained)


def slope(run: Callable[[Case, int], float], case: Case) -> float:
    """CPU microseconds per trained token, from the steps that the long run has and the short one does not."""

    def cost(steps: int) -> tuple[float, float]:
        with quiet():
            start = time.process_time()
            tokens = run(case, steps)
            return time.process_time() - start, tokens

    (short_seconds, short_tokens), (long_seconds, long_tokens) = cost(case.short), cost(case.long)
    return (long_seconds - short_seconds) / (long_tokens - short_tokens) * 1e6


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of tuner and of libraries."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def silence() -> None:
    """Suppress what libraries write to the terminal despite redirection."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/sft_cost.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    silence()
    peers = (run_bare, run_tuner) if options.without_trl else (run_bare, run_tuner, run_trl)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in make_cases(Path(folder)):
            with quiet():  # imports and first allocations
                for run in peers:
                    run(case, 1)
            rounds = [(slope(run_bare, case), slope(run_tuner, case)) for _ in range(options.rounds)]
            bare, tuner_cost = (statistics.median(costs) for costs in zip(*rounds, strict=True))
            ratio = statistics.median(tuner_cost / bare for bare, tuner_cost in rounds)
            trl = 0.0 if options.without_trl else slope(run_trl, case)
            row = [
                case.name,
                f"{bare:.1f}",
                f"{tuner_cost:.1f}",
                f"{ratio:.2f}",
                f"≤ {LIMIT:.2f}",
                verdict(ratio, LIMIT),
            ]
            rows.append(row + ([f"{trl:.1f}", f"{trl / bare:.2f}"] if trl else []))
    columns = ["", "bare loop", "tuner", "tuner/bare", "limit", "within"]
    report(
        "sft_cost",
        "SFT: CPU µs per trained token",
        columns if options.without_trl else [*columns, "TRL", "TRL/bare"],
        rows,
        notes=[
            "Differences between a short and a long run (nano 2 and 14 steps, tiny 1 and 3) of 4,096 tokens per step "
            f"in passes of 2,048, fp32; median of {options.rounds} rounds, TRL measured once."
        ],
        packages=("torch", "transformers", "peft", "trl"),
        write=options.write,
    )
    return int(any(row[5] == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
