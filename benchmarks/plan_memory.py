"""The memory plan of `tuner check --memory` compared with the memory that real training steps hold.

    python benchmarks/plan_memory.py [--write] [--only TEXT]

Small random models of several families take two steps of two passes each on a CPU that computes with CUDA's casts and
kernels (live_memory.py), and every storage is counted while it lives, as a GPU's allocator does. Compared are the peak
of the second step, and of it what a pass adds to weights, gradients and optimizer state; a pass has too few tokens for
the fixed sizes to hide an error. Layers' inputs that wait in host memory are counted apart. Exits with 1 where a plan
is more than 5% off any of them. No GPU was measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from live_memory import LiveMemory, cuda_arithmetic
from memory_cases import CASES, SHAPE, Case, write_model
from memory_steps import ANSWER, CPU, SEGMENTS, STEPS, load, policy_roles
from report import report, verdict
from torch import nn

from tuner.config import AdamW, Model
from tuner.models import offload
from tuner.models.memory import MemoryBudget, MemoryPlan, memory_plan, roles_plan
from tuner.training.optimizers import make_optimizer

LIMIT = 0.05
"""Largest deviation of a plan from what is counted."""
META = torch.device("meta")


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
        f"Memory of a step in MB, planned and counted; {CASES[0].tokens:,} tokens a pass, "
        f"{SHAPE['num_hidden_layers']} layers",
        (
            "",
            *("planned", "counted", "ratio"),
            *("of a pass: planned", "counted", "ratio"),
            *("on the host: planned", "counted", "ratio"),
            f"within {LIMIT:.0%}",
        ),
        rows,
        packages=("torch", "transformers", "peft", "bitsandbytes", "trl"),
        write=options.write,
    )
    return int(any(row[-1] == "NO" for row in rows))


@dataclass(frozen=True)
class Memory:
    """Of a case, in bytes."""

    peak: float
    of_pass: float
    """What a pass adds, of the peak, to weights, gradients and optimizer state."""
    host: float
    """Peak of what waits in host memory, and is no part of the others."""


def row_of(case: Case) -> list[str]:
    """A line of the table."""
    planned, counted = measure(case)
    sizes = [(planned.peak, counted.peak), (planned.of_pass, counted.of_pass), (planned.host, counted.host)]
    cells, ratios = [case.name], []
    for plan, count in sizes:
        if plan or count:
            ratios.append(plan / count if count else float("inf"))
            cells += [f"{plan / 1e6:.2f}", f"{count / 1e6:.2f}", f"{ratios[-1]:.3f}"]
        else:
            cells += ["", "", ""]
    return [*cells, verdict(max(abs(ratio - 1) for ratio in ratios), LIMIT)]


def measure(case: Case) -> tuple[Memory, Memory]:
    """As planned, and as counted."""
    warnings.simplefilter("ignore")
    with TemporaryDirectory() as folder, cuda_arithmetic():
        model = write_model(case, Path(folder, "model"))
        steps, held, trained = STEPS[case.stage](case, model, CPU)
        counted = count(case, steps, held, trained)
        plan = _PLANS[case.stage](case, model)
    fixed = ("weights", "gradients", "optimizer state", "heads")
    always = sum(
        size for name, size in plan.terms.items() if name.endswith(fixed) or name.endswith("in fp32")
    )
    return Memory(plan.peak, plan.peak - always, plan.host), counted


def count(
    case: Case, step: Callable[[], None], held: list[nn.Module], trained: dict[str, nn.Parameter]
) -> Memory:
    """What the second step's passes hold."""
    gc.collect()
    memory = LiveMemory()
    memory.hold(tensor for model in held for tensor in tensors_of(model))
    optimizer = make_optimizer(AdamW(bits=case.bits), trained) if trained else None
    with memory, patch.object(offload, "host_like", memory.on_host(offload.host_like)):
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
    return Memory(float(memory.peak), float(memory.peak - static), float(memory.host_peak))


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


def budget_of(case: Case, **changes: Any) -> MemoryBudget:
    """The budget that `tuner check` makes of such a config."""
    settings: dict[str, Any] = {
        "precision": case.precision,
        "optimizer_bits": case.bits,
        "tokens_per_pass": case.tokens,
        "gradient_checkpointing": case.recomputation,
        "mlp_tile": case.mlp_tile,
        "adapter_dropout": case.adapter.dropout if case.adapter else 0.0,
        "language_head": case.stage != "reward",
        "generates": False,
        "passes_share_casts": case.stage in ("sft", "reward"),
        "padded_to": case.tokens // SEGMENTS if case.stage == "dpo" else 0,
    }
    return MemoryBudget(**settings | changes)


def single_plan(case: Case, model: Model) -> MemoryPlan:
    return memory_plan(budget_of(case), [load(case, model, META)])


def policy_plan(case: Case, model: Model) -> MemoryPlan:
    return roles_plan(budget_of(case, language_head=case.stage == "policy"), policy_roles(case, model, META))


def generation_plan(case: Case, model: Model) -> MemoryPlan:
    tokens = 64 * (case.tokens // 32 + ANSWER)
    changes = {
        "generates": True,
        "generated": tokens,
        "generated_rows": 64,
        "prefilled": case.tokens,
        "tokens_per_pass": 1,
    }
    loaded = load(case, model, META)
    loaded.model.requires_grad_(False)
    return memory_plan(budget_of(case, **changes), [loaded])


_PLANS = {
    "sft": single_plan, "reward": single_plan, "dpo": single_plan, "policy": policy_plan, "critic": policy_plan,
    "generation": generation_plan,
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
