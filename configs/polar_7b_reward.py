"""Reward: POLAR-7B, which scores an answer by comparing it with the row's reference, fine-tuned on preferences."""

from tuner.config import AdamW, Cosine, FocalRanking, Model, Preferences, RewardModel, Split

config = RewardModel(
    model=Model(path="internlm/POLAR-7B-Base"),
    data=Preferences(
        files=("data/polar/*.jsonl",),
        template="polar",
        max_length=16_384,
        too_long="drop",
        split=Split(validation=0.005, test=0.01),
    ),
    loss=FocalRanking(gamma=0.0, barrier=0.0),
    optimizer=AdamW(lr=1e-5, betas=(0.9, 0.95)),
    schedule=Cosine(warmup=0.03, final=0.1),
    tokens_per_step=64 * 1_024,
    tokens_per_pass=32_768,
)
