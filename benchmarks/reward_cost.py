"""Cost of a preference pair: tuner, a bare torch loop over the same packed rows, TRL and LLaMA-Factory.

    python benchmarks/reward_cost.py [--rounds 5] [--without-trl] [--llamafactory PYTHON] [--write]

CPU milliseconds, as the difference between a short and a long run over the pairs trained in between, so that imports,
loading and saving do not count; one thread; medians of rounds in which tuner and the bare loop alternate. The bare loop
has one attention call per segment, a linear head on the last hidden state of each answer, -log sigmoid of the
difference, and AdamW. TRL and LLaMA-Factory get the same pairs in the same order, padded as usual, with as many pairs
per pass as fill one of tuner's on average (nine or ten; their default is eight), without gradient checkpointing, in
fp32. LLaMA-Factory needs other versions of the libraries: PYTHON is the interpreter of an environment with `pip install
llamafactory`; without it LLaMA-Factory is left out. Memory is the peak of a whole run in a process of its own, above
that of a run of one step on one short pair. Exits with 1 if a limit is missed.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
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
from own_process import peak_megabytes
from report import report, verdict
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tuner
import tuner.resources
from tuner.config import AdamW, LoRA, Model, Preferences, RewardModel, override
from tuner.data.stream import Stream
from tuner.models.adapters import add_adapter
from tuner.models.load import load_tokenizer
from tuner.models.tiny import tiny_model_folder
from tuner.models.unwrap import unwrapped
from tuner.stages.data_view import load_rows
from tuner.stages.packed_rows import plan

BARE, TRL, LLAMAFACTORY, MEMORY = 1.05, 2.4, 2.9, 0.5
"""Limits: cost of tuner / bare loop (maximum), of TRL and LLaMA-Factory / tuner (minimum), memory of tuner / TRL
(maximum)."""
TOKENS_PER_STEP, TOKENS_PER_PASS = 8_192, 4_096
STEPS = {"nano": (2, 32), "tiny": (1, 8)}
"""Steps of the two runs whose difference is measured: more where a step is fast."""
CASES = ("nano, LoRA", "nano, full", "tiny, LoRA", "tiny, full")


@dataclass(frozen=True)
class Case:
    """A comparison: a model, trained in full or with an adapter."""

    name: str
    config: RewardModel
    stream: Stream
    rows: Path
    """The pairs as text, one per line: sample i of the stream is line i."""
    llama: Path
    """The model's folder in Llama's layout, which the peers load."""

    @property
    def steps(self) -> tuple[int, int]:
        """Steps of the short and the long run."""
        return STEPS[self.name.split(",")[0]]

    @property
    def order(self) -> list[int]:
        """Samples in training order, of the long run and a few more steps."""
        return [sample for plan in self.stream.steps[: self.steps[1] + 2] for sample in plan.samples.tolist()]

    @property
    def padded_batch(self) -> tuple[int, int]:
        """(pairs per pass, passes per step) of the peers, which pad: on average as many tokens as tuner's."""
        return (
            max(1, round(TOKENS_PER_PASS / float(self.stream.lengths.mean()))),
            TOKENS_PER_STEP // TOKENS_PER_PASS,
        )


def write_rows(file: Path, count: int = 2000) -> None:
    """Write pairs with a long tail of lengths, from Python's reference manual; answers differ in length."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    generator = np.random.default_rng(0)

    def text(length: float) -> str:
        num_words, start = int(np.clip(length, 2, 200)), int(generator.integers(0, len(words) - 200))
        return " ".join(words[start : start + num_words])

    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            size = float(generator.lognormal(4.0, 0.8))
            first, second = size * 2 / 3 * generator.lognormal(0.0, 0.3, 2)
            row = {"prompt": text(size / 3), "chosen": text(first), "rejected": text(second)}
            lines.write(json.dumps(row) + "\n")


def write_single_row(file: Path) -> None:
    """Write the smallest trainable file: one short pair."""
    file.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n", encoding="utf-8")


def make_case(name: str, folder: Path, rows: Path) -> Case:
    """The case with this name on a file of pairs; `folder` caches models and tokens."""
    nano = folder / "nano"
    if not nano.exists():
        tiny_model_folder("org/llama", nano)
    config = RewardModel(
        model=Model(path=str(nano)),
        adapter=LoRA(r=16),
        reward_token="<|finetune_right_pad_id|>",
        data=Preferences(
            files=(str(rows),),
            template="llama3",
            max_length=TOKENS_PER_PASS // 2,
            cache=str(folder / "cache"),
        ),
        optimizer=AdamW(lr=1e-4),
        tokens_per_step=TOKENS_PER_STEP,
        tokens_per_pass=TOKENS_PER_PASS,
        precision="fp32",
        gradient_checkpointing=False,
    )
    if name.startswith("tiny"):
        tiny = {
            "model.path": "tuner:tiny",
            "data.template": "internlm2",
            "reward_token": "[UNUSED_TOKEN_130]",
        }
        config = override(config, tiny)
    if name.endswith("full"):
        config = override(config, {"adapter": None})
    llama = as_llama(config.model, folder / "llama") if name.startswith("tiny") else nano
    return Case(name, config, plan(config, load_rows(config)), rows, llama)


def as_llama(model: Model, destination: Path) -> Path:
    """Write the same weights in Llama's layout, with the tokenizer."""
    if destination.exists():
        return destination
    original = AutoModelForCausalLM.from_pretrained(tuner.resources.locate(model.path), dtype=torch.float32)
    names = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    shared = {name: getattr(original.config, name) for name in names if hasattr(original.config, name)}
    llama = LlamaForCausalLM(LlamaConfig(**shared))
    llama.load_state_dict(original.state_dict())
    llama.save_pretrained(destination)
    load_tokenizer(model).save_pretrained(destination)
    return destination


def run_tuner(case: Case, steps: int) -> int:
    """A whole run with its folder; returns the number of pairs trained on, as do the other functions."""
    with tempfile.TemporaryDirectory() as runs:
        config = override(case.config, {"max_steps": steps, "name": "bench", "checkpoint.every": None})
        metrics = tuner.train(config, runs=runs).metrics
    assert len(metrics) == steps
    return sum(len(plan.samples) for plan in case.stream.steps[:steps])


def per_segment(module, query, key, value, attention_mask, *, scaling=None, segment_lengths=None, **_):
    """One attention call per segment: the bare loop's isolation."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = zip(*(tensor.split(segment_lengths, 2) for tensor in (query, key, value)), strict=True)
    out = torch.cat([scaled_dot_product_attention(*part, is_causal=True, scale=scaling) for part in parts], 2)
    return out.transpose(1, 2), None


def run_bare(case: Case, steps: int) -> int:
    """A minimal training loop: the same rows, a linear head, the ranking loss, AdamW."""
    AttentionInterface.register("bench_per_segment", per_segment)
    path = tuner.resources.locate(case.config.model.path)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="bench_per_segment"
    )
    if case.config.adapter is not None:
        model = add_adapter(model.requires_grad_(False), case.config.adapter, 0)
    backbone = unwrapped(model).get_decoder()
    head = torch.nn.Linear(backbone.config.hidden_size, 1, bias=False)
    trained = [weight for weight in (*backbone.parameters(), *head.parameters()) if weight.requires_grad]
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    pairs = 0
    for step in range(steps):
        total = len(case.stream.steps[step].samples)
        for batch in case.stream.batches(step):
            hidden = backbone(
                input_ids=batch.tokens_T[None],
                position_ids=batch.positions_T[None],
                use_cache=False,
                segment_lengths=torch.diff(batch.offsets).tolist(),
            ).last_hidden_state[0]
            scores = head(hidden[batch.offsets[1:] - 1])[:, 0]
            assert batch.pairs is not None
            differences = scores[batch.pairs.better_P] - scores[batch.pairs.worse_P]
            (-logsigmoid(differences).sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pairs += total
    return pairs


def pair_tokens(case: Case, sample: int) -> dict[str, list[int]]:
    """A pair as a row of TRL's dataset."""
    batch = case.stream.batch([sample])
    parts = torch.split(batch.tokens_T, torch.diff(batch.offsets).tolist())
    assert batch.pairs is not None
    better, worse = int(batch.pairs.better_P), int(batch.pairs.worse_P)
    return {"chosen_ids": parts[better].tolist(), "rejected_ids": parts[worse].tolist()}


def run_trl(case: Case, steps: int) -> int:
    """TRL's RewardTrainer on the same token ids."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import RewardConfig, RewardTrainer

    adapter = case.config.adapter
    pairs, passes = case.padded_batch
    with tempfile.TemporaryDirectory() as output:
        trainer = RewardTrainer(
            model=str(case.llama),
            args=RewardConfig(
                output_dir=output,
                max_steps=steps,
                max_length=case.config.data.max_length,
                per_device_train_batch_size=pairs,
                gradient_accumulation_steps=passes,
                learning_rate=1e-4,
                bf16=False,
                gradient_checkpointing=False,
                # The same pairs in the same order: cost depends on their lengths.
                train_sampling_strategy="sequential",
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([pair_tokens(case, sample) for sample in case.order]),
            processing_class=load_tokenizer(case.config.model),
            peft_config=LoraConfig(
                task_type="SEQ_CLS", r=adapter.r, target_modules="all-linear", modules_to_save=["score"]
            )
            if adapter is not None
            else None,
        )
        trainer.train()
    assert trainer.state.global_step == steps
    return steps * pairs * passes


def padding(case: Case) -> float:
    """Fraction of the tokens in the peers' passes that is padding."""
    pairs, passes = case.padded_batch
    samples = case.order[: case.steps[1] * pairs * passes]
    lengths = [[len(ids) for ids in pair_tokens(case, sample).values()] for sample in samples]
    filled = sum(map(sum, lengths))
    padded = sum(
        2 * len(batch) * max(map(max, batch))
        for batch in (lengths[start : start + pairs] for start in range(0, len(lengths), pairs))
    )
    return 1 - filled / padded


LLAMAFACTORY_PROGRAM = """
import json, sys, tempfile, time, types
from importlib.machinery import ModuleSpec

import torch

try:
    import torchaudio
except (ImportError, OSError):  # imported for audio, which is not needed here
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.train.tuner import run_exp

torch.set_num_threads(1)
job = json.loads(sys.argv[1])
seconds = []
for steps in job["steps"]:
    with tempfile.TemporaryDirectory() as output:
        start = time.process_time()
        run_exp(job["arguments"] | {"max_steps": steps, "output_dir": output})
        seconds.append(time.process_time() - start)
print(json.dumps(seconds))
"""
"""Run by LLaMA-Factory's interpreter: whole runs with these numbers of steps; prints their CPU seconds."""


def llamafactory_cost(python: str, case: Case) -> float:
    """CPU milliseconds per pair of LLaMA-Factory's reward stage, measured in the same way."""
    pairs, passes = case.padded_batch
    lines = case.rows.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pairs.jsonl").write_text(
            "\n".join(lines[sample] for sample in case.order), encoding="utf-8"
        )
        columns = {name: name for name in ("prompt", "chosen", "rejected")}
        info = {"pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": columns}}
        Path(folder, "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        arguments = {
            "stage": "rm",
            "do_train": True,
            "model_name_or_path": str(case.llama),
            "template": {"llama3": "llama3", "internlm2": "intern2"}[case.config.data.template],
            "default_system": "",
            "dataset_dir": folder,
            "dataset": "pairs",
            "cutoff_len": case.config.data.max_length,
            "overwrite_cache": True,
            "disable_shuffling": True,  # the same pairs in the same order: cost depends on their lengths
            "finetuning_type": "full",
            "per_device_train_batch_size": pairs,
            "gradient_accumulation_steps": passes,
            "learning_rate": 1e-4,
            "disable_gradient_checkpointing": True,
            "logging_steps": 10,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        if case.config.adapter is not None:
            arguments |= {"finetuning_type": "lora", "lora_rank": case.config.adapter.r, "lora_target": "all"}
        short, long = case.steps
        # A first run of one step, not counted, takes imports and first allocations.
        job = json.dumps({"arguments": arguments, "steps": [1, short, long]})
        completed = subprocess.run(
            [python, "-c", LLAMAFACTORY_PROGRAM, job],
            check=False,
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"HF_HOME": folder, "TOKENIZERS_PARALLELISM": "false"},
        )
        if completed.returncode:
            raise SystemExit(f"LLaMA-Factory under {python} failed:\n{completed.stderr[-3000:]}")
    _, short_seconds, long_seconds = json.loads(completed.stdout.splitlines()[-1])
    return (long_seconds - short_seconds) / ((long - short) * pairs * passes) * 1e3


RUNS: dict[str, Callable[[Case, int], int]] = {"bare": run_bare, "tuner": run_tuner, "trl": run_trl}


def cost(trainer: str, case: Case) -> float:
    """CPU milliseconds per pair, from the steps that the long run has and the short one does not."""

    def measure(steps: int) -> tuple[float, int]:
        with quiet():
            start = time.process_time()
            pairs = RUNS[trainer](case, steps)
            return time.process_time() - start, pairs

    (short_seconds, short_pairs), (long_seconds, long_pairs) = (measure(steps) for steps in case.steps)
    return (long_seconds - short_seconds) / (long_pairs - short_pairs) * 1e3


def memory(trainer: str, name: str, folder: Path) -> float:
    """Peak memory of a long run in MB, above the peak of a trivial step."""

    def peak(rows: str) -> float:
        command = [sys.executable, __file__, "--peak", trainer, name, rows, str(folder)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return peak("rows") - peak("single")


def peak_of_this_process(trainer: str, name: str, rows: str, folder: str) -> float:
    """Peak resident memory in MB, of a run on many pairs ("rows") or of one step on a single pair ("single")."""
    with quiet():
        case = make_case(name, Path(folder), Path(folder, f"{rows}.jsonl"))
        RUNS[trainer](case, case.steps[1] if rows == "rows" else 1)
    return peak_megabytes()


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


def compare(case: Case, trainers: list[str], python: str | None, rounds: int) -> list[list[str]]:
    """Report rows of a case: medians of rounds in which tuner and the bare loop alternate; peers are measured once."""
    with quiet():  # imports and first allocations
        for trainer in trainers:
            RUNS[trainer](case, 1)
    costs = [(cost("tuner", case), cost("bare", case)) for _ in range(rounds)]
    tuner_cost, bare = (statistics.median(values) for values in zip(*costs, strict=True))
    ratio = statistics.median(tuner_cost / bare for tuner_cost, bare in costs)
    rows = [line(f"{case.name}, ms: tuner / bare loop", [tuner_cost, bare], ratio, BARE)]
    if "trl" in trainers:
        trl = cost("trl", case)
        title = f"{case.name}, ms: TRL / tuner"
        rows.append(line(title, [trl, tuner_cost], trl / tuner_cost, TRL, least=True))
    if python is not None:
        llamafactory = llamafactory_cost(python, case)
        title = f"{case.name}, ms: LLaMA-Factory / tuner"
        ratio = llamafactory / tuner_cost
        rows.append(line(title, [llamafactory, tuner_cost], ratio, LLAMAFACTORY, least=True))
    return rows


def line(title: str, pair: list[float], ratio: float, limit: float, *, least: bool = False) -> list[str]:
    """A row of the report: two values, their ratio, and whether it is within its limit (least: a minimum)."""
    limit_text = f"{'≥' if least else '≤'} {limit:.2f}"
    return [
        title,
        *(f"{value:.1f}" for value in pair),
        f"{ratio:.2f}",
        limit_text,
        verdict(ratio, limit, least=least),
    ]


def notes(rounds: int, padded: dict[str, float], python: str | None) -> list[str]:
    """Notes below the table."""
    steps = ", ".join(f"{model} {short} and {long} steps" for model, (short, long) in STEPS.items())
    shares = " and ".join(f"{share:.0%} ({model})" for model, share in padded.items())
    lines = [
        f"Differences between a short and a long run ({steps}) of {TOKENS_PER_STEP:,} tokens per step in passes of "
        f"{TOKENS_PER_PASS:,}, fp32; tuner and the bare loop: median of {rounds} rounds, the peers measured once.",
        f"The peers pad: {shares} of the tokens they compute are padding.",
        "Memory: peak of a whole run above that of one step on one short pair, measured once.",
    ]
    if python is not None:
        program = "import importlib.metadata as metadata; print(metadata.version('llamafactory'))"
        version = subprocess.run(
            [python, "-c", program], check=True, capture_output=True, text=True
        ).stdout.strip()
        lines.append(f"LLaMA-Factory {version}, in an environment of its own.")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument(
        "--llamafactory", metavar="PYTHON", help="interpreter of an environment with LLaMA-Factory"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/reward_cost.md")
    parser.add_argument(
        "--peak", nargs=4, metavar=("TRAINER", "CASE", "ROWS", "FOLDER"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    silence()
    if options.peak:
        print(peak_of_this_process(*options.peak))
        return 0

    trainers = ["bare", "tuner"] if options.without_trl else ["bare", "tuner", "trl"]
    table, padded = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.jsonl")
        write_single_row(folder / "single.jsonl")
        for name in CASES:
            case = make_case(name, folder, folder / "rows.jsonl")
            padded[name.split(",")[0]] = padding(case)
            table += compare(case, trainers, options.llamafactory, options.rounds)
            if "trl" in trainers:
                tuner_peak, trl_peak = (memory(trainer, name, folder) for trainer in ("tuner", "trl"))
                table.append(
                    line(
                        f"{name}, peak MB: tuner / TRL", [tuner_peak, trl_peak], tuner_peak / trl_peak, MEMORY
                    )
                )
    sys.argv = [
        "PYTHON" if word == options.llamafactory else word for word in sys.argv
    ]  # the report has the command
    report(
        "reward_cost",
        "Reward models: CPU ms per preference pair, and peak memory",
        ["", "first", "second", "ratio", "limit", "within"],
        table,
        notes=notes(options.rounds, padded, options.llamafactory),
        packages=("torch", "transformers", "peft", "trl"),
        write=options.write,
    )
    return int(any(row[-1] == "NO" for row in table))


if __name__ == "__main__":
    sys.exit(main())
