"""Reward: SmolLM2-135M as a conditional reward model, with LoRA; 18 minutes on one CPU core."""

from tuner.config import AdamW, LoRA, Model, PairEvaluation, Preferences, RewardModel, Source

CONDITIONS = ("brief", "detailed", "polite", "blunt", "json", "plain")

config = RewardModel(
    model=Model(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
    adapter=LoRA(r=16, alpha=32),
    conditions={name: f"tuner:twins/{name}.txt" for name in CONDITIONS},
    # the default is InternLM2's; a token of this vocabulary that no answer contains
    reward_token="<|endoftext|>",
    data=Preferences(
        files=(Source(path="tuner:twins/train.jsonl", limit=2_400),),
        test_files=("tuner:twins/test.jsonl",),
        template="chatml",
        max_length=192,
    ),
    optimizer=AdamW(lr=5e-4, weight_decay=0.01),
    tokens_per_step=768,
    tokens_per_pass=768,
    evaluation=PairEvaluation(rows=240),
)
