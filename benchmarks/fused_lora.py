"""LoRA layers of a block, fused and peft's own: CPU time, and what waits for the backward pass.

    python benchmarks/fused_lora.py [--rounds 5] [--write]

Forward and backward pass of the linear layers of a block (query, key, value, output; gate, up, down), each with an
adapter of rank 16, over 512 tokens in bf16 under autocast; the base in bf16 and in 4 bit. CPU microseconds a token are
minima over rounds in which both alternate, with one thread. Bytes a token are those of distinct saved tensors, weights
left out. Exits with 1 if the fused layers take more time or keep more than peft's.
"""

import argparse
import os
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from report import report, verdict
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tuner.models.adapter_kinds import peft_library
from tuner.models.kernels.lora import install
from tuner.models.quantization import bitsandbytes

TOKENS, HIDDEN, INSIDE, RANK = 512, 768, 2_048, 16
LIMIT = 1.0
"""Of fused to plain: it does the same products, and less beside them."""


class Block(nn.Module):
    """The linear layers of a decoder layer, in their order, with what stands between them left out."""

    def __init__(self, linear: type[nn.Linear], **settings: object) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, linear(HIDDEN, HIDDEN, bias=False, **settings))
        for name in ("gate_proj", "up_proj"):
            setattr(self, name, linear(HIDDEN, INSIDE, bias=False, **settings))
        self.down_proj = linear(INSIDE, HIDDEN, bias=False, **settings)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.o_proj(self.q_proj(hidden) + self.k_proj(hidden) + self.v_proj(hidden))
        return self.down_proj(self.gate_proj(hidden) * self.up_proj(hidden))


def adapted(kind: str, fused: bool) -> nn.Module:
    torch.manual_seed(0)
    if kind == "nf4":
        linear = bitsandbytes().nn.Linear4bit
        block = Block(linear, compute_dtype=torch.bfloat16, quant_type="nf4").bfloat16().to("cpu")
    else:
        block = Block(nn.Linear).bfloat16()
    targets = [name for name, _ in block.named_children()]
    peft = peft_library()
    model = peft.get_peft_model(
        block, peft.LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False)
    )
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if fused:
        assert install(model) == len(targets)
    return model


def step(model: nn.Module, hidden: torch.Tensor) -> float:
    """CPU seconds of a forward and backward pass."""
    start = time.process_time()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(hidden).backward(torch.ones_like(hidden))
    return time.process_time() - start


def kept_bytes(model: nn.Module, hidden: torch.Tensor) -> int:
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", dtype=torch.bfloat16), saved_tensors_hooks(pack, lambda tensor: tensor):
        model(hidden)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/fused_lora.md")
    options = parser.parse_args()
    hidden = torch.randn(1, TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    rows: list[list[str]] = []
    for kind in ("bf16", "nf4"):
        fused, plain = (adapted(kind, is_fused) for is_fused in (True, False))
        seconds = [(step(fused, hidden), step(plain, hidden)) for _ in range(options.rounds + 1)][1:]
        times = [min(column) / TOKENS * 1e6 for column in zip(*seconds, strict=True)]
        sizes = [kept_bytes(model, hidden) / TOKENS for model in (fused, plain)]
        for unit, values in (("CPU µs a token", times), ("bytes a token", sizes)):
            ratio = values[0] / values[1]
            cells = [f"{value:,.0f}" for value in values]
            row = [f"{kind}, {unit}", *cells, f"{ratio:.2f}", f"≤ {LIMIT:.2f}", verdict(ratio, LIMIT)]
            rows.append(row)
    report(
        "fused_lora",
        f"LoRA layers of a block, hidden size {HIDDEN}, MLP {INSIDE:,}, rank {RANK}, {TOKENS} tokens",
        ("", "fused", "peft", "ratio", "limit", "within"),
        rows,
        packages=("torch", "peft", "bitsandbytes"),
        write=options.write,
    )
    return int(any(row[-1] == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
