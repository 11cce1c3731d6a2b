"""Write the quickstart's data: sums asked in a chat, with exact answers.

    python scripts/make_sums.py

writes `tuner/embedded/sums/train.jsonl` and `test.jsonl`, the same bytes every time. A row is
`{"messages": [{"role": "user", "content": "What is 23 + 45?"}, {"role": "assistant",
"content": "23 + 45 = 68."}]}`: the answer restates the sum, since the base model can complete a sum that is written
out; to copy one from a question is what the quickstart teaches it.

A fixed share of all unordered pairs of operands is *reserved* (see `is_reserved`): the test rows are drawn
from them, and neither the training rows nor the pre-training text (scripts/tiny_corpus.py) ever shows one,
in any wording or order. A correct answer to a test row is therefore computed, not memorized.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path

EMBEDDED = Path(__file__).resolve().parent.parent / "tuner" / "embedded"
RESERVED_ONE_IN = 16
WORDINGS = (
    "What is {a} + {b}?",
    "How much is {a} + {b}?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "Please work out {a} + {b}.",
    "What is the sum of {a} and {b}?",
)
# Numbers of digits of the two operands -> probability; no longer than in the pre-training text (tiny_corpus.py).
DIGITS = {(1, 1): 0.05, (1, 2): 0.25, (2, 2): 0.70}


Row = dict[str, list[dict[str, str]]]


def is_reserved(a: int, b: int) -> bool:
    """Whether this problem is reserved for the test; the same for `a + b` and `b + a`."""
    # not hash(), which Python salts anew in every process
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % RESERVED_ONE_IN == 0


def draw_number(random_source: random.Random, num_digits: int) -> int:
    """A number of exactly `num_digits` digits (0 counts as one digit)."""
    return random_source.randrange(10 ** (num_digits - 1) if num_digits > 1 else 0, 10**num_digits)


def draw_problem(random_source: random.Random, digits: dict[tuple[int, int], float]) -> tuple[int, int]:
    """Two operands in random order, with numbers of digits drawn by the weights of `digits`."""
    lengths = list(random_source.choices(list(digits), weights=list(digits.values()))[0])
    random_source.shuffle(lengths)
    return draw_number(random_source, lengths[0]), draw_number(random_source, lengths[1])


def draw_rows(random_source: random.Random, num_rows: int, reserved: bool) -> list[Row]:
    """Distinct problems, all reserved or none, a conversation each. Raises ValueError if there are too few."""
    longest = max(max(lengths) for lengths in DIGITS)
    operands = range(10**longest)
    num_problems = sum(is_reserved(a, b) is reserved for a in operands for b in range(a + 1))
    if num_rows > num_problems:
        raise ValueError(f"{num_rows} rows requested, but there are only {num_problems} such problems")
    seen: set[tuple[int, int]] = set()
    rows = []
    while len(rows) < num_rows:
        a, b = draw_problem(random_source, DIGITS)
        problem = (min(a, b), max(a, b))
        if is_reserved(a, b) is not reserved or problem in seen:
            continue
        seen.add(problem)
        question = random_source.choice(WORDINGS).format(a=a, b=b)
        answer = f"{a} + {b} = {a + b}."
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's data.")
    parser.add_argument("--output", type=Path, default=EMBEDDED / "sums", help="folder to write to")
    parser.add_argument("--train", type=int, default=2000, help="number of training rows")
    parser.add_argument("--test", type=int, default=200, help="number of test rows")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    random_source = random.Random(arguments.seed)
    write_rows(arguments.output / "train.jsonl", draw_rows(random_source, arguments.train, reserved=False))
    write_rows(arguments.output / "test.jsonl", draw_rows(random_source, arguments.test, reserved=True))


if __name__ == "__main__":
    main()
