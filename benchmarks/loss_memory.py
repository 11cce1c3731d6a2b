"""Loss over a large vocabulary: tuner's chunked cross-entropy compared with full logits.

    python benchmarks/loss_memory.py [--rounds 1] [--write]

Forward and backward pass of 2,048 tokens over InternLM2's vocabulary of 92,544 from a hidden size of 1,024, with the
head frozen (LoRA) and trained (full). Each measurement is a process of its own with one thread: CPU seconds (minimum
over rounds in which both alternate) and the growth of resident memory above the inputs. Losses must agree. Exits with 1
if the chunked loss takes more than 1.05 × the time of the plain one, or more than half of its memory.
"""

import argparse
import json
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"

from own_process import in_own_process, peak_megabytes, reset_peak
from report import report, verdict

TOKENS, HIDDEN, VOCABULARY = 2_048, 1_024, 92_544
TIME, MEMORY = 1.05, 0.5
"""Limits relative to the plain loss: seconds (5% are noise, since the matrix products are the same), and memory."""
LOSSES = ("chunked", "plain")
CASES = [(dtype, head) for dtype in ("bf16", "fp32") for head in ("frozen", "trained")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/loss_memory.md")
    parser.add_argument("--measure", nargs=3, metavar=("LOSS", "DTYPE", "HEAD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return 0

    rows = []
    for dtype, head in CASES:
        rounds = [
            {kind: in_own_process(__file__, kind, dtype, head) for kind in LOSSES}
            for _ in range(options.rounds)
        ]
        chunked, plain = (
            {name: min(costs[kind][name] for costs in rounds) for name in rounds[0][kind]} for kind in LOSSES
        )
        tolerance = 1e-3 if dtype == "bf16" else 1e-5
        assert abs(chunked["loss"] / plain["loss"] - 1) < tolerance, (
            f"{dtype}: {chunked['loss']} is not {plain['loss']}"
        )
        for name, unit, limit in (("seconds", "CPU s", TIME), ("memory", "MB", MEMORY)):
            ratio = chunked[name] / plain[name]
            rows.append(
                [
                    f"{dtype}, head {head}, {unit}",
                    *(
                        f"{value[name]:.2f}" if unit == "CPU s" else f"{value[name]:,.0f}"
                        for value in (chunked, plain)
                    ),
                    f"{ratio:.2f}",
                    f"≤ {limit:.2f}",
                    verdict(ratio, limit),
                ]
            )
    report(
        "loss_memory",
        f"Cross entropy of {TOKENS:,} tokens over {VOCABULARY:,} entries, hidden size {HIDDEN:,}",
        ("", "chunked", "plain", "ratio", "limit", "within"),
        rows,
        packages=("torch",),
        write=options.write,
    )
    return int(any(row[-1] == "NO" for row in rows))


def measure(kind: str, dtype: str, head: str) -> dict[str, float]:
    """Loss per token, CPU seconds, and growth of resident memory in MB, of a forward and backward pass."""
    import time

    import torch
    from torch.nn.functional import cross_entropy as plain_cross_entropy

    from tuner.losses.token import cross_entropy

    generator = torch.Generator().manual_seed(0)
    activation_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    weight_dtype = (
        torch.float32 if head == "trained" else activation_dtype
    )  # trained weights are held in fp32
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(activation_dtype).requires_grad_()
    weight = torch.empty(VOCABULARY, HIDDEN, dtype=weight_dtype).normal_(std=0.02, generator=generator)
    weight.requires_grad_(head == "trained")
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.ones(TOKENS)
    warm = torch.randn(64, 64, dtype=activation_dtype)
    # The first product sets up threads and kernels, whose memory would count as the loss's.
    (warm @ warm).sum().item()

    before = reset_peak()
    start = time.process_time()
    if kind == "chunked":
        loss = cross_entropy(hidden, weight, targets, weights)
    else:  # as models of transformers do it: logits in fp32
        logits = torch.nn.functional.linear(hidden, weight.to(activation_dtype)).float()
        loss = plain_cross_entropy(logits, targets, reduction="sum")
    loss.backward()
    seconds = time.process_time() - start
    return {"loss": loss.item() / TOKENS, "seconds": seconds, "memory": peak_megabytes() - before}


if __name__ == "__main__":
    sys.exit(main())
