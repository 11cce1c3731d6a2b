"""PPO: InternLM2-1.8B, conditional reward model, the paper's settings; four full models, an estimated 58 GiB."""

from tuner.config import PPO, AdamW, PolicyEvaluation, Prompts, Replay, Sampling, Source, Split

config = PPO(
    policy="internlm/internlm2-chat-1_8b-sft",
    reward="runs/internlm2_1_8b_reward",
    # full-parameter training: the roles' weights differ, so they cannot share a base
    roles="separate",
    prompts=Prompts(
        files=(
            Source(path="data/prompts/helpful/*.jsonl", condition="helpful", share=2),
            Source(path="data/prompts/harmless/*.jsonl", condition="harmless", share=1),
        ),
        template="internlm2",
        split=Split(test=0.01),
    ),
    # limits how many prompts are answered at once; the default of 4 GiB would need more rounds of generation
    sampling=Sampling(cache_gib=12),
    optimizer=AdamW(lr=1e-6, bits=8),
    replay=Replay(files=("data/pretrain/*.jsonl",), split=Split(test=0.002)),
    max_steps=400,  # 204,800 prompts
    evaluation=PolicyEvaluation(every=20, rows=200),
)
