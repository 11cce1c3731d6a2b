"""PPO: InternLM2-20B against its conditional reward model, four roles on one 4-bit base; an estimated 48 GiB.

The paper's settings, but ten times its learning rates, as adapters need.
"""

from tuner.config import PPO, AdamW, LoRA, Model, PolicyEvaluation, Prompts, Replay, Sampling, Source, Split

config = PPO(
    # the base of internlm2_20b_reward_qlora, so that all roles share it; an SFT run on this base works as well
    policy=Model(path="internlm/internlm2-chat-20b-sft", quantization="nf4"),
    adapter=LoRA(r=64, alpha=16),
    reward="runs/internlm2_20b_reward_qlora",
    prompts=Prompts(
        files=(
            Source(path="data/prompts/helpful/*.jsonl", condition="helpful", share=2),
            Source(path="data/prompts/harmless/*.jsonl", condition="harmless", share=1),
        ),
        template="internlm2",
        split=Split(test=0.01),
    ),
    # limits how many prompts are answered at once; the default of 4 GiB would need more rounds of generation
    sampling=Sampling(cache_gib=16),
    optimizer=AdamW(lr=1e-5, bits=8, paged=True),
    critic_lr=5e-5,
    replay=Replay(files=("data/pretrain/*.jsonl",), split=Split(test=0.002)),
    max_steps=400,  # 204,800 prompts
    evaluation=PolicyEvaluation(every=20, rows=200),
)
