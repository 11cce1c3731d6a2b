"""Write the quickstart's data on answer styles (manners): for SFT, the reward model, and PPO.

    python scripts/make_manners.py

writes `tuner/embedded/manners/train.jsonl`, `pairs.jsonl`, `prompts.jsonl` and `test.jsonl`, the same bytes every
time. The questions are those of scripts/make_sums.py. Without a system turn the policy answers with the sum alone; with
one it learns here to answer in any manner of the twins (scripts/make_twins.py) except JSON.

`train.jsonl` has conversations for SFT, all answered correctly, each in a random manner: the trained policy is
sometimes polite and sometimes blunt, so that PPO has a choice to shift. `pairs.jsonl` compares answers with and without
a tone, for the reward model: the twins of make_twins.py only compare polite with blunt answers, and a reward model that
has never seen neutral ones may score them highest, which PPO would exploit. `prompts.jsonl` has more questions for PPO,
to which the config adds the same system turn for the policy; `test.jsonl` has the held-out ones: sums of the reserved
pairs, which occur in no other data of the quickstart in any wording or order. A prompt row also has a `reference`, the
correct statement, which the gold rule looks for.
"""

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path

from make_sums import EMBEDDED, WORDINGS, draw_problem, is_reserved
from make_twins import NUMBER_DIGITS, TONES, Content, Manner

SYSTEM = "Talk to your guest."
"""Distinguishes these conversations from the plain sums; configs/quickstart_ppo.py gives the policy the same one."""
# Probability of each manner; brief has neither tone nor detail. No JSON: the base has never seen a brace, and with its
# output layer frozen an adapter does not learn to write one.
MANNERS = {"brief": 0.25, "detailed": 0.15, "polite": 0.3, "blunt": 0.3}

Row = dict[str, object]


def draw_question(random_source: random.Random, test: bool) -> tuple[str, Content]:
    """A sum and its answer; for the test, of the reserved pairs only."""
    while True:
        a, b = draw_problem(random_source, NUMBER_DIGITS)
        if is_reserved(a, b) is test:
            break
    prompt = random_source.choice(WORDINGS).format(a=a, b=b)
    detail = f"The ones make {a % 10 + b % 10}, and with the tens it comes to {a + b}."
    return prompt, Content(f"{a} + {b} = {a + b}.", detail)


def draw_manner(random_source: random.Random, manners: Mapping[str, float] = MANNERS) -> Manner:
    """One of the manners, by their probabilities.

    A tone follows the sum: a small model copies numbers worse the further back they are, and PPO, whose reward model
    hardly distinguishes right sums from wrong ones, would prefer openings at the cost of right answers.
    """
    name = random_source.choices(list(manners), weights=list(manners.values()))[0]
    closings = TONES[name][1] if name in TONES else ("",)
    return Manner(detailed=name == "detailed", closing=random_source.choice(closings))


def conversations(
    random_source: random.Random, num_rows: int, manners: Mapping[str, float] = MANNERS
) -> list[Row]:
    """Distinct rows for SFT, in these manners."""
    rows: dict[tuple[str, str], Row] = {}
    while len(rows) < num_rows:
        prompt, content = draw_question(random_source, test=False)
        answer = draw_manner(random_source, manners).write(content)
        turns = (("system", SYSTEM), ("user", prompt), ("assistant", answer))
        rows[prompt, answer] = {"messages": [{"role": role, "content": text} for role, text in turns]}
    return list(rows.values())


def pairs(random_source: random.Random, num_twins: int) -> list[Row]:
    """Distinct rows for the reward model, in twins: a neutral answer ranks between the two opposite tones."""
    rows: dict[tuple[str, ...], Row] = {}
    while len(rows) < 2 * num_twins:
        prompt, content = draw_question(random_source, test=False)
        tone, opposite = random_source.sample(tuple(TONES), 2)
        toned = Manner(detailed=False, closing=random_source.choice(TONES[tone][1])).write(content)
        toneless = Manner(detailed=random_source.random() < 0.5).write(content)
        for better, worse, condition in ((toned, toneless, tone), (toneless, toned, opposite)):
            row: Row = {"prompt": prompt, "chosen": better, "rejected": worse, "condition": condition}
            rows[prompt, better, worse] = row
    return list(rows.values())


def prompts(random_source: random.Random, num_rows: int, test: bool) -> list[Row]:
    """Rows for PPO with distinct prompts."""
    rows: dict[str, Row] = {}
    while len(rows) < num_rows:
        prompt, content = draw_question(random_source, test)
        rows[prompt] = {"prompt": prompt, "reference": content.statement.removesuffix(".")}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's data on answer styles.")
    parser.add_argument("--output", type=Path, default=EMBEDDED / "manners", help="folder to write to")
    parser.add_argument("--train", type=int, default=1400, help="number of conversations for SFT")
    parser.add_argument("--twins", type=int, default=300, help="number of twins for the reward model")
    parser.add_argument("--prompts", type=int, default=500, help="number of prompts for PPO")
    parser.add_argument("--test", type=int, default=120, help="number of held-out prompts")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    random_source = random.Random(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("train", conversations(random_source, arguments.train)),
        ("prompts", prompts(random_source, arguments.prompts, test=False)),
        ("test", prompts(random_source, arguments.test, test=True)),
        ("pairs", pairs(random_source, arguments.twins)),
    ):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.output / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
