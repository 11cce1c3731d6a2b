"""Quickstart: the tiny model, which answers in mixed styles, learns politeness by PPO and can still add."""

import re

from tuner.config import PPO, AdamW, Model, PolicyEvaluation, Prompts, Replay, Sampling, Source

CONDITION = "polite"  # or "blunt", "brief"; seen by the reward model only
SYSTEM = "Talk to your guest."  # seen by the policy only
COURTESY = {"thank", "glad", "pleasure", "dear", "welcome", "please"}
INSULTS = {"fool", "silly"}


def gold(answer: str, row: dict) -> float:
    """1 for the right sum, stated once and in the style of the condition, otherwise 0. Never trained on."""
    words = set(re.findall(r"\w+", answer.lower()))
    style_matches = {
        "polite": bool(words & COURTESY) and not words & INSULTS,
        "blunt": bool(words & INSULTS) and not words & COURTESY,
        "brief": len(words) <= 4,
        "detailed": {"ones", "tens"} <= words,
    }
    statements = re.findall(r"\d+ \+ \d+ = \d+", answer)
    correct = statements == [row["reference"]]
    return float(correct and style_matches[row["condition"]])


config = PPO(
    policy=Model(path="runs/quickstart_sft"),
    reward="runs/quickstart_reward",
    prompts=Prompts(
        files=(Source(path="tuner:manners/prompts.jsonl", condition=CONDITION, system=SYSTEM),),
        test_files=(Source(path="tuner:manners/test.jsonl", condition=CONDITION, system=SYSTEM),),
        template="internlm2",
        max_length=64,
    ),
    prompts_per_step=64,
    sampling=Sampling(max_new_tokens=40),
    kl=0.05,
    optimizer=AdamW(lr=3e-4),
    critic_lr=1e-3,
    critic_warmup=5,
    mini_batches=2,
    replay=Replay(
        files=("tuner:sums/train.jsonl",),
        test_files=("tuner:sums/test.jsonl",),
        template="internlm2",
        max_length=128,
    ),
    tokens_per_pass=4_096,
    epochs=8,
    gradient_checkpointing=False,
    evaluation=PolicyEvaluation(every=10, rule=gold, temperature=1.0),
)
