"""Record the golden losses again, after an intended change of numerics: python scripts/record_goldens.py

Prints the changes since the last recording. Commit tests/golden/losses.json with the reason for them.
"""

import os
import sys
from pathlib import Path

# Before torch is imported, which reads it once. One thread adds sums in the same order every time.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.golden import runs


def main() -> None:
    before = runs.read() if runs.FILE.is_file() else None
    after = runs.record()
    for name, values in after["runs"].items():
        recorded = before and before["runs"].get(name)
        pairs = zip(values["loss"], recorded["loss"], strict=False) if recorded else ()
        largest_change = max((abs(new / old - 1) for new, old in pairs), default=None)
        change = (
            "recorded for the first time"
            if largest_change is None
            else f"largest relative change {largest_change:.1e}"
        )
        print(f"{name:<6} loss {values['loss'][0]:.4f} -> {values['loss'][-1]:.4f}; {change}")
    print(f"{runs.FILE}: commit it with the reason for the change")


if __name__ == "__main__":
    main()
