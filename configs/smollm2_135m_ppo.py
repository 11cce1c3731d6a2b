"""PPO: SmolLM2-135M-Instruct learns short answers to arithmetic, on prompts from scripts/make_reasoning.py."""

import re

from tuner.config import PPO, AdamW, LoRA, Model, PolicyEvaluation, Prompts, Sampling, Source
from tuner.errors import UserError

SYSTEM = (
    "Answer with the number alone."  # seen by the policy only; the reward model sees the condition "brief"
)


def gold(answer: str, row: dict) -> float:
    """reasoning-gym's score of the last number of an answer; 0 for more than eight words or no number."""
    try:
        from reasoning_gym import get_score_answer_fn
    except ImportError as error:
        raise UserError("gold: the package reasoning-gym is missing: pip install reasoning-gym") from error
    numbers = re.findall(r"-?\d+", answer)
    if not numbers or len(answer.split()) > 8:
        return 0.0
    score = get_score_answer_fn(row["metadata"]["source_dataset"])
    return float(score(numbers[-1], {"answer": row["reference"], "metadata": row["metadata"]}))


config = PPO(
    policy=Model(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
    adapter=LoRA(r=16, alpha=32),
    reward="runs/smollm2_135m_reward",  # of smollm2_135m_reward.py, on the same base, so that all four roles share it
    prompts=Prompts(
        files=(Source(path="data/reasoning/prompts.jsonl", condition="brief", system=SYSTEM),),
        test_files=(Source(path="data/reasoning/test.jsonl", condition="brief", system=SYSTEM),),
        template="chatml",
        max_length=128,
    ),
    prompts_per_step=64,
    sampling=Sampling(max_new_tokens=48),
    optimizer=AdamW(lr=1e-4),
    critic_lr=5e-4,
    critic_warmup=5,
    missing_end_penalty=1.0,
    tokens_per_pass=4_096,
    epochs=12,
    evaluation=PolicyEvaluation(every=10, rows=50, rule=gold),
)
