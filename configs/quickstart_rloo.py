"""Quickstart: the task of quickstart_ppo by RLOO: eight answers per prompt, no critic."""

from quickstart_ppo import config as ppo
from quickstart_ppo import gold

from tuner.config import RLOO, AdamW, PolicyEvaluation

config = RLOO(
    policy=ppo.policy,
    reward=ppo.reward,
    prompts=ppo.prompts,
    # 8 prompts of 8 answers: a rollout of 64 answers, as in quickstart_ppo
    prompts_per_step=8,
    answers_per_prompt=8,
    sampling=ppo.sampling,
    kl=0.05,
    optimizer=AdamW(lr=3e-4),
    mini_batches=2,
    replay=ppo.replay,
    tokens_per_pass=4_096,
    epochs=2,
    gradient_checkpointing=False,
    evaluation=PolicyEvaluation(every=20, rule=gold, temperature=1.0),
)
