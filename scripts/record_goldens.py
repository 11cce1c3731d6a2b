"""Record the golden losses anew, after a change of numbers that is meant: python scripts/record_goldens.py

Says what has changed since the last recording; commit tests/golden/losses.json with the reason.
"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.golden import runs


def main() -> None:
    before = runs.read() if runs.FILE.is_file() else None
    after = runs.record()
    for name, values in after["runs"].items():
        known = before and before["runs"].get(name)
        pairs = zip(values["loss"], known["loss"], strict=False) if known else ()
        moved = max((abs(new / old - 1) for new, old in pairs), default=None)
        change = "recorded for the first time" if moved is None else f"largest relative change {moved:.1e}"
        print(f"{name:<6} loss {values['loss'][0]:.4f} -> {values['loss'][-1]:.4f}; {change}")
    print(f"{runs.FILE}: commit it with the reason")


if __name__ == "__main__":
    main()
