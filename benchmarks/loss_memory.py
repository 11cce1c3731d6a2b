"""The loss over a large vocabulary: tuner's chunked cross entropy against plain logits, in one run.

    python benchmarks/loss_memory.py [--rounds 1] [--write]

Forward and backward of 2,048 learned tokens over InternLM2's 92,544 entries from a hidden size of 1,024; the
head frozen (LoRA) and trained (full). Every measurement is a process of its own, one thread: CPU seconds (the
least of the rounds, the ways taking turns) and how far resident memory grows above the inputs. Losses must
agree. Exits with 1 when a chunked one takes more than 1.05 × the time of the plain one, or half of its memory.
"""

import argparse
import json
import os
import subprocess
import sys

os.environ["OMP_NUM_THREADS"] = "1"

from report import report, verdict

TOKENS, HIDDEN, VOCABULARY = 2_048, 1_024, 92_544
TIME, MEMORY = 1.05, 0.5
"""Limits: seconds (5% are noise: the products are the same) and memory, over those of the plain loss."""
WAYS = ("chunked", "plain")
CASES = [(dtype, head) for dtype in ("bf16", "fp32") for head in ("frozen", "trained")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/loss_memory.md")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "DTYPE", "HEAD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return 0

    rows = []
    for dtype, head in CASES:
        rounds = [{way: in_own_process(way, dtype, head) for way in WAYS} for _ in range(options.rounds)]
        own, plain = (
            {name: min(one[way][name] for one in rounds) for name in rounds[0][way]} for way in WAYS
        )
        tolerance = 1e-3 if dtype == "bf16" else 1e-5
        assert abs(own["loss"] / plain["loss"] - 1) < tolerance, (
            f"{dtype}: {own['loss']} is not {plain['loss']}"
        )
        for name, unit, limit in (("seconds", "CPU s", TIME), ("memory", "MB", MEMORY)):
            ratio = own[name] / plain[name]
            rows.append(
                [
                    f"{dtype}, head {head}, {unit}",
                    *(
                        f"{value[name]:.2f}" if unit == "CPU s" else f"{value[name]:,.0f}"
                        for value in (own, plain)
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


def in_own_process(way: str, dtype: str, head: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", way, dtype, head]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(way: str, dtype: str, head: str) -> dict[str, float]:
    """Loss per token, CPU seconds and growth of resident memory in MB, of one forward and backward."""
    import resource
    import time

    import torch
    from torch.nn.functional import cross_entropy as plain_cross_entropy

    from tuner.losses.token import cross_entropy

    generator = torch.Generator().manual_seed(0)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    weight_dtype = torch.float32 if head == "trained" else kind  # trained weights are held in fp32
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(kind).requires_grad_()
    weight = torch.empty(VOCABULARY, HIDDEN, dtype=weight_dtype).normal_(std=0.02, generator=generator)
    weight.requires_grad_(head == "trained")
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.ones(TOKENS)
    warm = torch.randn(64, 64, dtype=kind)
    (warm @ warm).sum().item()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    if way == "chunked":
        loss = cross_entropy(hidden, weight, targets, weights)
    else:  # as the models of transformers do it: logits in fp32
        logits = torch.nn.functional.linear(hidden, weight.to(kind)).float()
        loss = plain_cross_entropy(logits, targets, reduction="sum")
    loss.backward()
    seconds = time.process_time() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"loss": loss.item() / TOKENS, "seconds": seconds, "memory": grown / 1000}


if __name__ == "__main__":
    sys.exit(main())
