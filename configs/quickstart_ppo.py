"""Quickstart: the tiny model, which answers in mixed manners, learns to be polite by PPO, and can still add."""

import re

from tuner.config import PPO, AdamW, Model, PolicyEvaluation, Prompts, Replay, Sampling, Source

CONDITION = "polite"  # or blunt, brief; the reward model alone is told
SYSTEM = "Talk to your guest."  # the policy alone is told
COURTESY = {"thank", "glad", "pleasure", "dear", "welcome", "please"}
INSULTS = {"fool", "silly"}


def gold(answer: str, row: dict) -> float:
    """1 for the right sum, said once, in the manner asked for: measured by code, never learned from."""
    words = set(re.findall(r"\w+", answer.lower()))
    manners = {
        "polite": bool(words & COURTESY) and not words & INSULTS,
        "blunt": bool(words & INSULTS) and not words & COURTESY,
        "brief": len(words) <= 4,
        "detailed": {"ones", "tens"} <= words,
    }
    right = re.findall(r"\d+ \+ \d+ = \d+", answer) == [row["reference"]]
    return float(right and manners[row["condition"]])


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
