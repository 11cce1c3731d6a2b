"""Reward: InternLM2-7B as a conditional reward model, with QLoRA on a single GPU."""

from tuner.config import AdamW, LoRA, Model, Preferences, RewardModel, Source, Split

config = RewardModel(
    model=Model(path="internlm/internlm2-chat-7b-sft", quantization="nf4"),
    adapter=LoRA(r=64, alpha=16),
    conditions={"helpful": "tuner:helpful", "harmless": "tuner:harmless"},
    data=Preferences(
        files=(
            Source(path="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", condition="helpful"),
            Source(path="Anthropic/hh-rlhf", subset="harmless-base", condition="harmless"),
        ),
        template="internlm2",
        too_long="cut",
        # HH-RLHF has a few rows that compare nothing, which are an error by default
        incomparable="drop",
        split=Split(validation=0.005, test=0.01),
    ),
    optimizer=AdamW(lr=1e-4, weight_decay=0.01, bits=8, paged=True),
    tokens_per_pass=4_096,
)
