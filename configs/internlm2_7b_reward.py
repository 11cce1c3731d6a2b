"""Reward: InternLM2-7B as a conditional reward model: full-parameter training, the paper's settings."""

from tuner.config import Model, Preferences, RewardModel, Source, Split

config = RewardModel(
    model=Model(path="internlm/internlm2-chat-7b-sft"),
    conditions={"helpful": "tuner:helpful", "harmless": "tuner:harmless"},
    data=Preferences(
        files=(
            Source(path="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", condition="helpful"),
            Source(path="Anthropic/hh-rlhf", subset="helpful-base", condition="helpful"),
            Source(path="Anthropic/hh-rlhf", subset="harmless-base", condition="harmless"),
        ),
        template="internlm2",
        max_length=8_192,
        too_long="cut",
        # HH-RLHF has a few rows that compare nothing, which are an error by default
        incomparable="drop",
        split=Split(validation=0.005, test=0.01),
    ),
)
