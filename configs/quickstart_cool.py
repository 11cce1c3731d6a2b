"""Quickstart: two rounds of COOL RLHF. The first exploits a flaw of its reward model, the second has it patched."""

import re

from tuner.config import (
    COOL,
    PPO,
    AdamW,
    Candidates,
    Model,
    Patch,
    PolicyEvaluation,
    Prompts,
    Round,
    Sampling,
    Source,
    load_config,
)

CONDITION = "polite"  # seen by the reward model only
SYSTEM = "Talk to your guest."  # seen by the policy only
COURTESY = {"thank", "glad", "pleasure", "dear", "welcome", "please"}
INSULTS = {"fool", "silly"}


def gold(answer: str, row: dict) -> float:
    """1 for the right sum, stated once and politely, otherwise 0. Never trained on."""
    words = set(re.findall(r"\w+", answer.lower()))
    statements = re.findall(r"\d+ \+ \d+ = \d+", answer)
    return float(statements == [row["reference"]] and bool(words & COURTESY) and not words & INSULTS)


def better(answer: str, row: dict) -> float:
    """What the labels go by: gold first, then no insults, then no idle sentences, neither the sum nor a courtesy."""
    sentences = [set(re.findall(r"\w+", part.lower())) for part in re.split(r"[.!?]", answer)]
    result = row["reference"].split()[-1]
    idle = [words for words in sentences if words and result not in words and not words & COURTESY]
    insulting = any(words & INSULTS for words in sentences)
    return gold(answer, row) - 0.5 * insulting - 0.1 * len(idle)


config = COOL(
    reward=load_config("quickstart_cool_reward"),
    policy=PPO(
        policy=Model(path="runs/quickstart_cool_sft"),
        reward="runs/quickstart_cool_reward",
        prompts=Prompts(
            files=(Source(path="tuner:manners/prompts.jsonl", condition=CONDITION, system=SYSTEM),),
            test_files=(Source(path="tuner:manners/test.jsonl", condition=CONDITION, system=SYSTEM),),
            template="internlm2",
            max_length=64,
        ),
        prompts_per_step=64,
        # not top_p=0.9, which cuts habits of a few percent out of all answers: they are neither exploited nor seen
        sampling=Sampling(max_new_tokens=32, top_p=1.0),
        kl=0.05,
        optimizer=AdamW(lr=3e-4),
        critic_lr=1e-3,
        critic_warmup=4,
        whiten_advantages=True,
        mini_batches=2,
        tokens_per_pass=4_096,
        epochs=8,
        gradient_checkpointing=False,
        evaluation=PolicyEvaluation(every=10, rule=gold, temperature=1.0),
    ),
    rounds=(
        Round(steps=30),
        Round(steps=30, patch=Patch(original=6, lr=5e-4)),
    ),
    candidates=Candidates(prompts=200, answers=2, slow=30, fast=70, patterns=1),
    feedback=(better,),
)
