"""Quickstart: two rounds of COOL RLHF. The first exploits a flaw of its reward model, the second has it patched."""

import re

from tuner.config import COOL, Candidates, Patch, Round, load_config, override

COURTESY = {"thank", "glad", "pleasure", "dear", "welcome", "please"}
INSULTS = {"fool", "silly"}


def better(answer: str, row: dict) -> float:
    """What the labels go by: the right sum, said once and politely; then no insults, then no idle sentences."""
    sentences = [set(re.findall(r"\w+", part.lower())) for part in re.split(r"[.!?]", answer)]
    words, result = set().union(*sentences), row["reference"].split()[-1]
    is_right = re.findall(r"\d+ \+ \d+ = \d+", answer) == [row["reference"]]
    idle = [part for part in sentences if part and result not in part and not part & COURTESY]
    insulting = bool(words & INSULTS)
    return (is_right and bool(words & COURTESY) and not insulting) - 0.5 * insulting - 0.1 * len(idle)


config = COOL(
    reward=load_config("quickstart_cool_reward"),
    policy=override(
        load_config("quickstart_ppo"),
        {
            "policy.path": "runs/quickstart_cool_sft",
            "reward.path": "runs/quickstart_cool_reward",
            "replay": None,
            # not 0.9, which cuts habits of a few percent out of all answers: they are neither exploited nor seen
            "sampling.top_p": 1.0,
            "sampling.max_new_tokens": 32,
            "critic_warmup": 4,
            "evaluation.every": 20,
            "whiten_advantages": True,
        },
    ),
    # 12: all original rows that labels do not contradict. They prefer bare sums to bare sums with the flaw: beside
    # fewer rows, the patched reward model came to care less for politeness, and so did the policy.
    rounds=(Round(steps=28), Round(steps=54, patch=Patch(original=12, lr=1e-3))),
    candidates=Candidates(prompts=200, answers=2, slow=60, fast=40, patterns=1),
    feedback=(better,),
)
