"""PPO: InternLM2-20B against its conditional reward model, four roles on one 4-bit base, one GPU.

The paper's numbers, and learning rates ten times its own, as adapters want.
"""

from tuner.config import PPO, AdamW, Model, Prompts, Replay, Sampling, Source

config = PPO(
    policy=Model(path="runs/internlm2_20b_qlora"),
    reward="runs/internlm2_20b_reward_qlora",
    prompts=Prompts(
        files=(
            Source(path="data/prompts/helpful/*.jsonl", condition="helpful", share=2),
            Source(path="data/prompts/harmless/*.jsonl", condition="harmless", share=1),
        ),
        template="internlm2",
    ),
    sampling=Sampling(max_new_tokens=1_024, top_p=0.9),
    optimizer=AdamW(lr=1e-5),
    critic_lr=5e-5,
    replay=Replay(files=("data/pretrain/*.jsonl",), coefficient=0.5, ratio=0.5),
    max_steps=400,
)
