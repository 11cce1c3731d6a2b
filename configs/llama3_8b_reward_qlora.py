"""Reward: Llama-3-8B-Instruct as a conditional reward model, with QLoRA on a single GPU."""

from tuner.config import AdamW, LoRA, Model, Preferences, RewardModel, Source, Split

config = RewardModel(
    model=Model(path="meta-llama/Meta-Llama-3-8B-Instruct", quantization="nf4"),
    adapter=LoRA(r=64, alpha=16),
    conditions={"helpful": "tuner:helpful", "harmless": "tuner:harmless"},
    # the default is InternLM2's; any token that no conversation contains will do
    reward_token="<|reserved_special_token_0|>",
    data=Preferences(
        files=(
            Source(path="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", condition="helpful"),
            Source(path="Anthropic/hh-rlhf", subset="harmless-base", condition="harmless"),
        ),
        template="llama3",
        too_long="cut",
        # HH-RLHF has a few rows that compare nothing, which are an error by default
        incomparable="drop",
        split=Split(validation=0.005, test=0.01),
    ),
    optimizer=AdamW(lr=1e-4, weight_decay=0.01, bits=8, paged=True),
    tokens_per_pass=4_096,
)
