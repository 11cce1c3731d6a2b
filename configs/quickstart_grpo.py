"""Quickstart: the task of quickstart_ppo by GRPO: eight answers per prompt, no critic."""

from quickstart_ppo import config as ppo
from quickstart_ppo import gold

from tuner.config import GRPO, AdamW, PolicyEvaluation

config = GRPO(
    policy=ppo.policy,
    reward=ppo.reward,
    prompts=ppo.prompts,
    # 8 prompts of 8 answers: a rollout of 64 answers, as in quickstart_ppo
    prompts_per_step=8,
    answers_per_prompt=8,
    sampling=ppo.sampling,
    # at 0.05, quickstart_ppo's, all of three seeds ended up exploiting the reward model (KL above 0.6, gold below 0.3)
    kl=0.3,
    optimizer=AdamW(lr=3e-4),
    mini_batches=2,
    replay=ppo.replay,
    tokens_per_pass=4_096,
    epochs=2,
    gradient_checkpointing=False,
    evaluation=PolicyEvaluation(every=20, rule=gold, temperature=1.0),
)
