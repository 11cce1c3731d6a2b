"""Write prompts with a scorer of their own for configs/smollm2_135m_ppo.py: arithmetic by the package reasoning-gym.

    pip install reasoning-gym
    python scripts/make_reasoning.py

writes `data/reasoning/prompts.jsonl` and `test.jsonl`, the same bytes every time with the same version of the
package (Apache-2.0; no part of tuner). A row is `{"prompt": "What is 4 - 1?", "reference": "3", "metadata": {...}}`;
`metadata` names the generator, whose scorer judges the answers. No question of the test is in the other file.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GENERATOR = "basic_arithmetic"
# Two terms up to ten: what a model of 135M parameters has right more often than not, if it comes to an answer.
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
MOST_DRAWN = 100
"""Questions drawn per row that is asked for, before there are said to be too few."""


def questions(num_rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows, no expression twice in any words; ImportError without reasoning-gym, ValueError if there are too few."""
    from reasoning_gym import create_dataset

    seen: set[str] = set()
    for entry in create_dataset(GENERATOR, seed=seed, size=MOST_DRAWN * num_rows, **SETTINGS):
        expression = entry["metadata"]["expression"]
        if expression in seen:
            continue
        seen.add(expression)
        yield {"prompt": entry["question"], "reference": entry["answer"], "metadata": entry["metadata"]}
        if len(seen) == num_rows:
            return
    raise ValueError(f"{num_rows} rows asked for, but only {len(seen)} such questions were found")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write prompts of reasoning-gym.")
    parser.add_argument("--output", type=Path, default=Path("data", "reasoning"), help="folder to write to")
    parser.add_argument("--prompts", type=int, default=160, help="number of prompts for PPO")
    parser.add_argument("--test", type=int, default=80, help="number of prompts held out")
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    try:
        rows = list(questions(asked.prompts + asked.test, asked.seed))
    except ImportError:
        sys.exit("make_reasoning: the package reasoning-gym is missing: pip install reasoning-gym")
    except ValueError as error:
        sys.exit(f"make_reasoning: {error}")
    asked.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", rows[: asked.test]), ("prompts", rows[asked.test :])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (asked.output / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
