"""Planning a million samples, into steps and packed passes, compared with TRL's packer.

    python benchmarks/planning.py [--samples 1000000] [--without-trl] [--write]

From lengths alone, as in a run: `plan_steps` for one epoch, then `pack` for every step. TRL packs the tokens themselves
(`pack_dataset`, "bfd"), here of one byte each so that copying is cheap. Exits with 1 if planning takes more than 3 CPU
seconds, steps are less than 99% full, or there are more than 1.05 × the minimum number of passes.
"""

import argparse
import collections
import os
import sys
import time

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
from report import report, verdict

from tuner.data.packing import pack, plan_steps, shuffled

TOKENS_PER_STEP, TOKENS_PER_PASS = 32_768, 2_048
SECONDS, FILL, PASSES = 3.0, 0.99, 1.05
"""Limits: CPU seconds (maximum), fill of tokens_per_step (minimum), passes relative to the fewest (maximum)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/planning.md")
    options = parser.parse_args()

    lengths = draw_lengths(options.samples)
    start = time.process_time()
    steps = plan_steps(lengths, TOKENS_PER_STEP, shuffled(len(lengths), 0), epochs=1.0)
    planning_seconds = time.process_time() - start
    passes = [pack(lengths[step.samples].tolist(), TOKENS_PER_PASS) for step in steps]
    seconds = time.process_time() - start
    check(lengths, steps, passes)

    fewest = lengths.sum() / TOKENS_PER_PASS
    fill = lengths.sum() / (len(steps) * TOKENS_PER_STEP)
    num_passes_ratio = sum(map(len, passes)) / fewest
    trl = None if options.without_trl else pack_with_trl(lengths)
    factor = options.samples / 1_000_000
    rows = [
        row("CPU seconds", seconds, trl and trl[0], SECONDS * factor, ".2f"),
        row("step fill", fill, None, FILL, ".2%", least=True),
        row("passes over the fewest", num_passes_ratio, trl and trl[1] / fewest, PASSES, ".4f"),
        row("tokens kept", 1.0, trl and trl[2], 1.0, ".2%", least=True),
    ]
    report(
        "planning",
        f"Planning {options.samples:,} samples ({lengths.sum():,} tokens)",
        ("", "tuner", "TRL bfd", "limit", "tuner/TRL", "within"),
        rows,
        notes=[
            f"{len(steps):,} steps of {TOKENS_PER_STEP:,} tokens ({planning_seconds:.2f} s of the seconds) in "
            f"{sum(map(len, passes)):,} passes of {TOKENS_PER_PASS:,}; TRL packs without steps, once and for all "
            "epochs, a thousand rows at a time."
        ],
        packages=("numpy", "trl", "datasets"),
        write=options.write,
    )
    return int(any(cells[-1] == "NO" for cells in rows))


def draw_lengths(count: int) -> np.ndarray:
    """Log-normal lengths with a median of 150 tokens and a long tail, cut at a pass, as in chat data."""
    lengths = np.random.default_rng(0).lognormal(5.0, 1.0, count)
    return np.clip(lengths, 8, TOKENS_PER_PASS).astype(np.int64)


def check(lengths: np.ndarray, steps: list, passes: list) -> None:
    """Assert that every sample occurs once, and that no step or pass exceeds its budget."""
    samples = np.concatenate([step.samples for step in steps])
    assert collections.Counter(samples.tolist()) == collections.Counter(range(len(lengths)))
    for step, groups in zip(steps, passes, strict=True):
        sizes = lengths[step.samples]
        assert sizes.sum() <= TOKENS_PER_STEP
        assert sorted(place for group in groups for place in group) == list(range(len(sizes)))
        assert all(sizes[group].sum() <= TOKENS_PER_PASS for group in groups)


def pack_with_trl(lengths: np.ndarray) -> tuple[float, int, float]:
    """(CPU seconds, packed rows, share of tokens kept) of TRL's packer on samples of these lengths."""
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc
    from trl import pack_dataset

    datasets.disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], np.int8)))
    rows = datasets.Dataset(pa.table({"input_ids": tokens}))
    start = time.process_time()
    packed = pack_dataset(rows, TOKENS_PER_PASS, "bfd", map_kwargs={"keep_in_memory": True})
    seconds = time.process_time() - start
    tokens_kept = sum(
        pc.sum(pc.list_value_length(chunk)).as_py() for chunk in packed.data["input_ids"].chunks
    )
    return seconds, len(packed), tokens_kept / int(lengths.sum())


def row(
    name: str, value: float, peer: float | None, limit: float, form: str, *, least: bool = False
) -> list[str]:
    """A row of the report. peer: TRL's value; least: whether the limit is a minimum."""
    peer_text, ratio = (format(peer, form), f"{value / peer:.2f}") if peer is not None else ("", "")
    sign = "≥" if least else "≤"
    return [
        name,
        format(value, form),
        peer_text,
        f"{sign} {format(limit, form)}",
        ratio,
        verdict(value, limit, least=least),
    ]


if __name__ == "__main__":
    sys.exit(main())
