"""PPO: InternLM2-1.8B against its conditional reward model, four full models, the paper's numbers.

All weights of policy and critic are trained, with 8-bit optimiser state; one GPU of 80 GB.
"""

from tuner.config import PPO, AdamW, Model, Prompts, Replay, Sampling, Source

config = PPO(
    policy=Model(path="internlm/internlm2-chat-1_8b-sft"),
    reward="runs/internlm2_1_8b_reward",
    roles="separate",
    prompts=Prompts(
        files=(
            Source(path="data/prompts/helpful/*.jsonl", condition="helpful", share=2),
            Source(path="data/prompts/harmless/*.jsonl", condition="harmless", share=1),
        ),
        template="internlm2",
    ),
    sampling=Sampling(max_new_tokens=1_024, top_p=0.9),
    optimizer=AdamW(lr=1e-6, bits=8),
    replay=Replay(files=("data/pretrain/*.jsonl",), coefficient=0.5, ratio=0.5),
    max_steps=400,
)
