"""Cost of one long row: forward and backward pass of its only sample, against the parts it cannot do without.

    python benchmarks/long_rows.py [--rounds 1] [--write]

The parts are measured by themselves: attention over the whole sample, as bare calls of PyTorch's, one a layer; and all
else, which is linear in the tokens, as a row of the same size in samples of 128 tokens, less the attention of these.
Every measurement is a process of its own with one thread, fp32, all weights of the embedded model trained, without
gradient checkpointing: CPU seconds, minimum over rounds. Memory is what the pass adds at its peak; by its growth over
three lengths, constants cancel. Exits with 1 where the row costs more than 1.05 × its parts, or where twice the tokens
take more than 2.1 × the memory.
"""

import argparse
import json
import os
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

from own_process import in_own_process, peak_megabytes, reset_peak
from report import report, verdict

LENGTHS = (8_192, 16_384, 32_768)
SHORT = 128
TIME, MEMORY = 1.05, 2.1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/long_rows.md")
    parser.add_argument("--measure", nargs=3, metavar=("PART", "SAMPLE", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        part, *numbers = options.measure
        print(json.dumps((measure_pass if part == "pass" else measure_attention)(*map(int, numbers))))
        return 0
    rows, peak = [], dict.fromkeys(LENGTHS, float("inf"))
    for length in LENGTHS:
        seconds = {name: float("inf") for name in ("row", "attention", "short row", "short attention")}
        for _ in range(options.rounds):  # in turn: what disturbs the machine disturbs all
            for name in seconds:
                part = "attention" if "attention" in name else "pass"
                cost = in_own_process(__file__, part, SHORT if "short" in name else length, length)
                seconds[name] = min(seconds[name], cost["seconds"])
                if name == "row":
                    peak[length] = min(peak[length], cost["memory"])
        linear = seconds["short row"] - seconds["short attention"]
        ratio = seconds["row"] / (linear + seconds["attention"])
        cells = (f"{value:.2f}" for value in (seconds["row"], seconds["attention"], linear, ratio))
        rows.append([f"{length:,} tokens, CPU s", *cells, f"≤ {TIME:.2f}", verdict(ratio, TIME)])
    small, middle, large = (peak[length] for length in LENGTHS)
    growth = (large - middle) / (middle - small)
    sizes = ", ".join(f"{length:,} tokens: {megabytes:,.0f} MB" for length, megabytes in peak.items())
    report(
        "long_rows",
        f"A row of one sample against its attention and its linear parts, in samples of {SHORT} tokens",
        ("", "row", "attention", "linear parts", "ratio", "limit", "within"),
        rows,
        notes=[
            f"Memory that the pass adds at its peak: {sizes}. From {LENGTHS[1]:,} on it grows {growth:.2f} × "
            f"as much as up to there, by twice as many tokens (limit {MEMORY:.2f}: {verdict(growth, MEMORY)})."
        ],
        packages=("torch", "transformers"),
        write=options.write,
    )
    return int(growth > MEMORY or any(row[-1] == "NO" for row in rows))


def measure_pass(sample: int, tokens: int) -> dict[str, float]:
    """CPU seconds and peak memory in MB of the loss and its gradients over a row in samples of one length."""
    import numpy as np
    import torch

    from tuner.config import Model
    from tuner.data.batch import make_batch
    from tuner.models.forward import token_loss
    from tuner.models.load import load_model

    torch.set_num_threads(1)
    loaded = load_model(Model(path="tuner:tiny"), precision="fp32", device=torch.device("cpu"))
    ids = np.random.default_rng(0).integers(10, 1_000, tokens).astype(np.int32)
    weights = np.ones(sample, np.float32)
    samples = [(ids[start : start + sample], weights) for start in range(0, tokens, sample)]
    token_loss(loaded.model, make_batch([(ids[:SHORT], weights[:SHORT])])).backward()  # first allocations
    batch = make_batch(samples)
    before = reset_peak()
    start = time.process_time()
    token_loss(loaded.model, batch).backward()
    return {"seconds": time.process_time() - start, "memory": peak_megabytes() - before}


def measure_attention(sample: int, tokens: int) -> dict[str, float]:
    """CPU seconds of the attention calls of all layers over a row in samples of one length, gradients included."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from tuner.config import Model
    from tuner.models.load import read_model_config

    torch.set_num_threads(1)
    config = read_model_config(Model(path="tuner:tiny"))
    heads = config.num_attention_heads
    shape = (1, heads, sample, config.hidden_size // heads)
    inputs = [torch.randn(shape).requires_grad_() for _ in range(3)]
    seconds = 0.0
    for count in (1, config.num_hidden_layers * (tokens // sample)):  # the first call is a warm-up
        begin = time.process_time()
        for _ in range(count):
            out = scaled_dot_product_attention(*inputs, is_causal=True)
            torch.autograd.grad(out.sum(), inputs)
        seconds = time.process_time() - begin
    return {"seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
