"""The memory plan of `tuner check --memory` compared with the memory that real training steps hold.

    python benchmarks/plan_memory.py [--write] [--only TEXT]

Small random models of several families take two steps of two passes each on a CPU that computes with CUDA's casts and
kernels (live_memory.py), and every storage is counted while it lives, as a GPU's allocator does. Compared are the peak
of the second step, and of it what a pass adds to weights, gradients and optimizer state; a pass has too few tokens for
the fixed sizes to hide an error. Exits with 1 where a plan is more than 5% off either. No GPU was measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from live_memory import LiveMemory, cuda_arithmetic
from report import report, verdict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import tuner.models.load  # noqa: F401 (registers InternLM2)
from tuner.config import FocalRanking, LoRA, Model
from tuner.data.batch import Batch, Pairs, make_batch
from tuner.models.arithmetic import autocast
from tuner.models.checkpointing import recompute_activations
from tuner.models.forward import scores, token_logprobs, token_loss, values
from tuner.models.generate import generate
from tuner.models.load import Loaded, load_model
from tuner.models.load_roles import PolicyModels, load_policy_roles
from tuner.models.memory import MemoryBudget, MemoryPlan, memory_plan, roles_plan
from tuner.models.pair_sums import pair_sums
from tuner.models.roles import Roles
from tuner.models.sampling import uniforms
from tuner.models.tiny import tiny_model_folder
from tuner.training.optimizers import make_optimizer

LIMIT = 0.05
"""Largest deviation of a plan from what is counted."""
TOKENS, SEGMENTS = 2_048, 4
CPU = torch.device("cpu")
META = torch.device("meta")
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2_048,
}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 256}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, all heads": ("llama", {"num_key_value_heads": 8}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "internlm2": ("internlm2", {"rope_theta": 1e6, "bias": False}),
    "internlm3": ("internlm3", {"bias": False, "qkv_bias": False}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma3": ("gemma3_text", GEMMA),
}
PLAIN, DROPPED = LoRA(r=16), LoRA(r=16, dropout=0.1)


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and what is done with it."""

    family: str
    stage: Literal["sft", "reward", "dpo", "policy", "critic", "generation"] = "sft"
    adapter: LoRA | None = None
    quantization: Literal["nf4"] | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    recomputes: bool = False
    vocabulary: int = 2_048
    bits: Literal[32, 8] = 32

    @property
    def name(self) -> str:
        trained = "all weights" if self.adapter is None else "LoRA"
        if self.quantization:
            trained = "QLoRA"
        if self.adapter is not None and self.adapter.dropout:
            trained += ", dropout"
        further = ["recomputed"] if self.recomputes else []
        further += [f"vocabulary {self.vocabulary:,}"] if self.vocabulary != 2_048 else []
        further += ["8-bit optimizer"] if self.bits == 8 else []
        return ", ".join([f"{self.stage}: {self.family}", trained, self.precision, *further])


CASES = [
    Case("llama"),
    Case("llama", recomputes=True),
    Case("llama", vocabulary=32_000, recomputes=True),
    Case("llama", precision="fp32"),
    Case("llama", precision="fp32", recomputes=True),
    Case("llama", adapter=PLAIN),
    Case("llama", adapter=DROPPED),
    Case("llama", adapter=DROPPED, recomputes=True),
    Case("llama", adapter=PLAIN, precision="fp32"),
    Case("llama", adapter=PLAIN, quantization="nf4"),
    Case("llama", adapter=DROPPED, quantization="nf4"),
    Case("llama", adapter=DROPPED, quantization="nf4", recomputes=True),
    Case("llama", adapter=PLAIN, quantization="nf4", recomputes=True, vocabulary=32_000),
    Case("llama, all heads", adapter=PLAIN, quantization="nf4"),
    Case("llama, tied head", recomputes=True),
    Case("internlm2", adapter=DROPPED, quantization="nf4", bits=8),
    Case("internlm2", recomputes=True, bits=8),
    Case("internlm3", adapter=PLAIN, quantization="nf4"),
    Case("mistral", adapter=PLAIN, recomputes=True),
    Case("qwen2", adapter=PLAIN),
    Case("qwen3"),
    Case("qwen3", adapter=PLAIN, quantization="nf4"),
    Case("gemma", adapter=PLAIN),
    Case("gemma3"),
    Case("gemma3", adapter=DROPPED, quantization="nf4", recomputes=True),
    Case("internlm2", "reward"),
    Case("internlm2", "reward", adapter=DROPPED, quantization="nf4", recomputes=True),
    Case("qwen3", "reward", adapter=PLAIN, recomputes=True),
    Case("llama", "dpo", adapter=PLAIN, recomputes=True),
    Case("llama", "dpo", adapter=PLAIN, quantization="nf4"),
    Case("internlm2", "policy", adapter=PLAIN, quantization="nf4"),
    Case("internlm2", "policy", adapter=PLAIN, quantization="nf4", recomputes=True, vocabulary=32_000),
    Case("llama", "policy", adapter=PLAIN),
    Case("internlm2", "critic", adapter=PLAIN, quantization="nf4"),
    Case("internlm2", "critic", adapter=PLAIN, quantization="nf4", recomputes=True),
    Case("internlm2", "generation", adapter=PLAIN, quantization="nf4"),
    Case("llama", "generation", adapter=PLAIN),
]


def main() -> int:
    """Count every case; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/plan_memory.md")
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        if options.only in case.name:
            rows.append(row_of(case))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    report(
        "plan_memory",
        f"Memory of a step in MB, planned and counted; {TOKENS:,} tokens a pass, {SHAPE['num_hidden_layers']} layers",
        ("", "planned", "counted", "ratio", "of a pass: planned", "counted", "ratio", f"within {LIMIT:.0%}"),
        rows,
        packages=("torch", "transformers", "peft", "bitsandbytes", "trl"),
        write=options.write,
    )
    return int(any(row[-1] == "NO" for row in rows))


def row_of(case: Case) -> list[str]:
    """A line of the table."""
    planned, of_pass, counted, counted_of_pass = measure(case)
    ratios = planned / counted, of_pass / counted_of_pass
    return [
        case.name,
        *(f"{size / 1e6:.2f}" for size in (planned, counted)),
        f"{ratios[0]:.3f}",
        *(f"{size / 1e6:.2f}" for size in (of_pass, counted_of_pass)),
        f"{ratios[1]:.3f}",
        verdict(max(abs(ratio - 1) for ratio in ratios), LIMIT),
    ]


def measure(case: Case) -> tuple[float, float, float, float]:
    """Bytes: the planned peak, and of it what a pass adds; the same as counted."""
    warnings.simplefilter("ignore")
    with TemporaryDirectory() as folder, cuda_arithmetic():
        model = write_model(case, Path(folder, "model"))
        steps, held, trained = _STEPS[case.stage](case, model, CPU)
        peak, static = count(case, steps, held, trained)
        plan = _PLANS[case.stage](case, model)
    fixed = ("weights", "gradients", "optimizer state", "heads")
    always = sum(
        size for name, size in plan.terms.items() if name.endswith(fixed) or name.endswith("in fp32")
    )
    return plan.peak, plan.peak - always, float(peak), float(peak - static)


def count(
    case: Case, step: Callable[[], None], held: list[nn.Module], trained: dict[str, nn.Parameter]
) -> tuple[int, int]:
    """Peak of the second step's passes in bytes, and of it what weights, gradients and optimizer state take."""
    gc.collect()
    memory = LiveMemory()
    memory.hold(tensor for model in held for tensor in tensors_of(model))
    optimizer = make_optimizer(optimizer_settings(case), trained) if trained else None
    with memory:
        step()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        gc.collect()
        memory.restart()
        static = memory.live + (
            0 if case.stage == "generation" else sum(4 * weight.numel() for weight in trained.values())
        )
        step()
    return memory.peak, static


def optimizer_settings(case: Case) -> Any:
    from tuner.config import AdamW

    return AdamW(bits=case.bits)


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """A model's weights and buffers, and the scales of quantized ones."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        state = getattr(tensor, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield from (
                (value for value in vars(part or object).values() if isinstance(value, torch.Tensor))
                if part
                else ()
            )


def write_model(case: Case, folder: Path) -> Model:
    """A random model of a case's family in a folder."""
    kind, changes = FAMILIES[case.family]
    tiny_model_folder(f"org/{kind.split('_')[0].rstrip('3') if kind.startswith('gemma') else kind}", folder)
    file = folder / "config.json"
    tokens = {
        name: value for name, value in json.loads(file.read_text()).items() if name.endswith("_token_id")
    }
    (folder / "model.safetensors").unlink()
    shape = SHAPE | {"vocab_size": case.vocabulary, "max_position_embeddings": 4_096} | changes
    config = AutoConfig.for_model(kind, **shape, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Model(path=str(folder), quantization=case.quantization)


def budget_of(case: Case, **changes: Any) -> MemoryBudget:
    """The budget that `tuner check` makes of such a config."""
    settings: dict[str, Any] = {
        "precision": case.precision,
        "optimizer_bits": case.bits,
        "tokens_per_pass": TOKENS,
        "gradient_checkpointing": case.recomputes,
        "adapter_dropout": case.adapter.dropout if case.adapter else 0.0,
        "language_head": case.stage != "reward",
        "generates": False,
        "passes_share_casts": case.stage in ("sft", "reward"),
        "padded_to": TOKENS // SEGMENTS if case.stage == "dpo" else 0,
    }
    return MemoryBudget(**settings | changes)


def load(case: Case, model: Model, device: torch.device) -> Loaded:
    """The model of a stage with one role."""
    head = "score" if case.stage == "reward" else "language"
    loaded = load_model(model, precision=case.precision, device=device, adapter=case.adapter, head=head)
    if case.recomputes:
        recompute_activations(loaded.model)
    return loaded


def rows_of(case: Case) -> list[Batch]:
    """Two packed rows of a few segments, all tokens with a loss; for a reward model pairs of segments."""
    generator, length = np.random.default_rng(0), TOKENS // SEGMENTS
    batches = []
    for _ in range(2):
        weights = np.ones(length, np.float32)
        if case.stage == "reward":
            weights[:-1] = 0
        samples = [(generator.integers(0, 1_000, length).astype(np.int32), weights) for _ in range(SEGMENTS)]
        batch = make_batch(samples)
        if case.stage == "reward":
            first = torch.arange(0, SEGMENTS, 2)
            ones = torch.ones(len(first))
            batch = Batch(**{**vars(batch), "pairs": Pairs(first, first + 1, ones, 0 * ones)})
        batches.append(batch)
    return batches


def single_step(case: Case, model: Model, device: torch.device) -> Any:
    """SFT and reward models: passes within one role, as their loops make them."""
    loaded = load(case, model, device)
    roles = Roles.of("policy", loaded, lambda: autocast(CPU, case.precision))
    batches = rows_of(case)

    def loss(opened: nn.Module, batch: Batch) -> torch.Tensor:
        if case.stage == "reward":
            sums = pair_sums(scores(opened, batch), batch, FocalRanking())
            return sums.ranking + sums.penalty
        return token_loss(opened, batch)

    def step() -> None:
        with roles.role("policy", train=True) as opened:
            for batch in batches:
                loss(opened, batch).backward()

    return step, [loaded.model], roles.trained("policy")


def padded_step(case: Case, model: Model, device: torch.device) -> Any:
    """DPO: a padded batch through the head that TRL fuses, and the reference's pass before the backward pass."""
    from trl.trainer.utils import add_fused_lm_head

    loaded = load(case, model, device)
    loaded.transformer.set_attn_implementation("sdpa")
    add_fused_lm_head(loaded.transformer, outputs=("log_probs", "entropy", "mean_logits"))
    roles = Roles.of("policy", loaded, lambda: autocast(CPU, case.precision))
    length = TOKENS // SEGMENTS
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 1_000, (SEGMENTS, length)))
    mask = torch.ones_like(tokens)
    mask[1, length // 2 :] = 0  # or transformers would leave the mask out

    def logprobs(opened: nn.Module) -> torch.Tensor:
        output = opened(
            input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False, fused_lm_head=True
        )
        return output.log_probs.sum(1)

    def step() -> None:
        for _ in range(2):
            with roles.role("policy", train=True) as opened:
                learned = logprobs(opened)
                with torch.no_grad(), loaded.model.disable_adapter():
                    reference = logprobs(opened)
                loss = -torch.nn.functional.logsigmoid((learned - reference).diff()).sum()
                loss.backward()

    return step, [loaded.model], roles.trained("policy")


def policy_roles(case: Case, model: Model, device: torch.device) -> Roles:
    """Policy, reference and critic on one base."""
    models = PolicyModels(
        policy=model,
        reference=None,
        reward=None,
        adapter=case.adapter,
        critic_adapter=None,
        critic_from="policy",
        layout="shared",
        roles=frozenset({"reference", "critic"}),
        template="internlm2" if case.family.startswith("internlm") else "llama3",
        precision=case.precision,
        seed=0,
        gradient_checkpointing=case.recomputes,
    )
    autocasts = (lambda: autocast(CPU, case.precision)) if device == CPU else nullcontext
    return load_policy_roles(models, device, autocasts).roles


def policy_step(case: Case, model: Model, device: torch.device) -> Any:
    """PPO's passes: each opens its role, and both adapters stand on one base."""
    roles = policy_roles(case, model, device)
    batches = dict.fromkeys(("policy", "critic"), rows_of(case))
    if case.stage == "critic":  # whose passes then decide: the policy's have few tokens
        batches["policy"] = [make_batch([(np.arange(64, dtype=np.int32), np.ones(64, np.float32))])]

    def step() -> None:
        for name in batches:
            for batch in batches[name]:
                with roles.role(name, train=True) as opened:
                    learned = values(opened, batch) if name == "critic" else token_logprobs(opened, batch)[0]
                    learned.square().sum().backward()
                    del learned

    trained = {
        f"{name}.{key}": value for name in ("policy", "critic") for key, value in roles.trained(name).items()
    }
    return step, [roles.loaded.model, *roles.heads], trained


def generation_step(case: Case, model: Model, device: torch.device) -> Any:
    """Answers of equal length, sampled."""
    loaded = load(case, model, device)
    roles = Roles.of("policy", loaded, lambda: autocast(CPU, case.precision))
    prompts = [list(range(200, 200 + TOKENS // 32))] * 64

    def step() -> None:
        with roles.role("policy") as opened:
            generate(
                opened, prompts, max_new_tokens=ANSWER, end_ids=frozenset(), tokens_per_pass=TOKENS,
                cache_bytes=2**40, temperature=1.0, noise=uniforms(0, 0, range(len(prompts)), ANSWER),
            )  # fmt: skip

    return step, [loaded.model], {}


ANSWER = 64
"""Tokens of an answer: a block of the cache, so that it has its full size as prompts are read, as the plan assumes."""


def single_plan(case: Case, model: Model) -> MemoryPlan:
    return memory_plan(budget_of(case), [load(case, model, META)])


def policy_plan(case: Case, model: Model) -> MemoryPlan:
    return roles_plan(budget_of(case, language_head=case.stage == "policy"), policy_roles(case, model, META))


def generation_plan(case: Case, model: Model) -> MemoryPlan:
    tokens = 64 * (TOKENS // 32 + ANSWER)
    changes = {
        "generates": True,
        "generated": tokens,
        "generated_rows": 64,
        "prefilled": TOKENS,
        "tokens_per_pass": 1,
    }
    loaded = load(case, model, META)
    loaded.model.requires_grad_(False)
    return memory_plan(budget_of(case, **changes), [loaded])


_STEPS = {
    "sft": single_step, "reward": single_step, "dpo": padded_step, "policy": policy_step, "critic": policy_step,
    "generation": generation_step,
}  # fmt: skip
_PLANS = {
    "sft": single_plan, "reward": single_plan, "dpo": single_plan, "policy": policy_plan, "critic": policy_plan,
    "generation": generation_plan,
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
