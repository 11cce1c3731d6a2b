"""Write arithmetic prompts from the package reasoning-gym, with its scorer, for configs/smollm2_135m_ppo.py.

    pip install reasoning-gym
    python scripts/make_reasoning.py

writes `data/reasoning/prompts.jsonl` and `test.jsonl`, the same bytes every time with the same version of the
package (Apache-2.0; not part of tuner). A row is `{"prompt": "What is 4 - 1?", "reference": "3", "metadata": {...}}`;
`metadata` names the generator, whose scorer scores the answers. The two files share no question.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GENERATOR = "basic_arithmetic"
# Two one-digit terms, which a model of 135M parameters mostly gets right if it gives an answer at all.
SETTINGS: dict[str, Any] = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
    "operators": ["+", "-"],
    "allow_parentheses": False,
    "allow_negation": False,
    "format_style": "natural",
}
MAX_DRAWS_PER_ROW = 100
"""Questions drawn per requested row before giving up."""


def questions(num_rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows with distinct expressions. Raises ImportError without reasoning-gym, ValueError if there are too few."""
    from reasoning_gym import create_dataset

    seen: set[str] = set()
    for entry in create_dataset(GENERATOR, seed=seed, size=MAX_DRAWS_PER_ROW * num_rows, **SETTINGS):
        # by expression, since the same sum in other words would cross from the prompts to the test
        expression = entry["metadata"]["expression"]
        if expression in seen:
            continue
        seen.add(expression)
        yield {"prompt": entry["question"], "reference": entry["answer"], "metadata": entry["metadata"]}
        if len(seen) == num_rows:
            return
    raise ValueError(
        f"{num_rows} rows requested, but only {len(seen)} distinct questions exist; lower --prompts or --test"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write arithmetic prompts from reasoning-gym.")
    parser.add_argument("--output", type=Path, default=Path("data", "reasoning"), help="folder to write to")
    parser.add_argument("--prompts", type=int, default=160, help="number of prompts for PPO")
    parser.add_argument("--test", type=int, default=80, help="number of held-out prompts")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    try:
        rows = list(questions(arguments.prompts + arguments.test, arguments.seed))
    except ImportError:
        sys.exit("make_reasoning: the package reasoning-gym is missing: pip install reasoning-gym")
    except ValueError as error:
        sys.exit(f"make_reasoning: {error}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", rows[: arguments.test]), ("prompts", rows[arguments.test :])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (arguments.output / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
