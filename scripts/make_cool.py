"""Write the rows of the demonstration of COOL RLHF: a habit of the policy that its reward model likes too well.

    python scripts/make_cool.py

writes `tuner/embedded/cool/conversations.jsonl`, `pairs.jsonl` and `test.jsonl`, the same bytes every time: the
planted marker of scripts/planted_hacks.py for SFT and for the reward model, and held-out preferences without it. Half
of these compare polite with blunt answers, the others a tone with none: a patch must not lose either distance.
"""

import argparse
import json
import random
from pathlib import Path

from make_manners import Row, draw_question
from make_sums import EMBEDDED
from make_twins import TONES, Manner
from planted_hacks import CONDITION, conversations, planted_pairs

KIND = "marker"
SHARE = 0.15
"""Share of the conversations with the marker; trained on for 70 steps, the policy says it in a few percent."""
MANNERS = {"brief": 0.35, "detailed": 0.25, "polite": 0.35, "blunt": 0.05}
"""Probability of each manner of the conversations.

Where every second answer that goes on behind its sum is blunt, ending there pays, and a policy may be left with bare
sums before it has learned how to go on.
"""
CHOSEN_SHARE = 0.6
"""Share of the planted preferences' chosen answers with the marker.

A patch leaves out the rows that prefer what its labels reject: what politeness is worth, it learns from the others.
"""
NUM_CLEAN_PAIRS = 150


def pairs(kind: str, seed: int) -> list[Row]:
    """Preferences for the reward model: planted ones, and clean ones that compare a tone with none.

    Without the latter, next to nothing but rows with the hack says that a tone is better than none, and a reward model
    that unlearns the hack has no reason to prefer politeness to the bare sum.
    """
    clean = toneless(random.Random(f"pairs {seed}"), NUM_CLEAN_PAIRS, test=False)
    return [*planted_pairs(kind, seed, CHOSEN_SHARE), *clean]


def held_out(random_source: random.Random) -> list[Row]:
    """The quickstart's held-out preferences under CONDITION, and others that compare a tone with none."""
    lines = (EMBEDDED / "twins/test.jsonl").read_text(encoding="utf-8").splitlines()
    twins = [row for row in map(json.loads, lines) if row.get("condition") == CONDITION]
    return [*twins, *toneless(random_source, count=140, test=True)]


def toneless(random_source: random.Random, count: int, test: bool) -> list[Row]:
    """Preferences under CONDITION that compare an answer in some tone with one in none; all different.

    test: of held-out questions.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    while len(rows) < count:
        prompt, content = draw_question(random_source, test=test)
        plain = Manner(detailed=random_source.random() < 0.5).write(content)
        tone = random_source.choice(tuple(TONES))
        toned = Manner(detailed=False, closing=random_source.choice(TONES[tone][1])).write(content)
        better, worse = (toned, plain) if tone == CONDITION else (plain, toned)
        rows[prompt, better, worse] = {
            "prompt": prompt,
            "chosen": better,
            "rejected": worse,
            "condition": CONDITION,
        }
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the rows of the demonstration of COOL RLHF.")
    parser.add_argument("--output", type=Path, default=EMBEDDED / "cool", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("conversations", conversations([KIND], arguments.seed, SHARE, MANNERS)),
        ("pairs", pairs(KIND, arguments.seed)),
        ("test", held_out(random.Random(f"test {arguments.seed}"))),
    ):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.output / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
