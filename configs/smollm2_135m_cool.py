"""COOL RLHF: two rounds of SmolLM2-135M-Instruct on arithmetic; a rule labels the pairs between them."""

import re

from tuner.config import COOL, Candidates, Patch, Round, load_config


def better(answer: str, row: dict) -> float:
    """The right number as the last one, in at most eight words; of two alike the shorter answer."""
    numbers, words = re.findall(r"-?\d+", answer), len(answer.split())
    return (numbers[-1:] == [row["reference"]] and words <= 8) - words / 1000


config = COOL(
    reward=load_config("smollm2_135m_reward"),
    policy=load_config("smollm2_135m_ppo"),
    rounds=(Round(steps=60), Round(steps=60, patch=Patch(original=5))),
    candidates=Candidates(prompts=100, slow=100, fast=50),
    feedback=(better,),
)
