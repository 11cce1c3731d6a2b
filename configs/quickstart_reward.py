"""Quickstart: the tiny model as a conditional reward model of conflicting preferences."""

from tuner.config import AdamW, Cosine, Model, Preferences, RewardModel

CONDITIONS = ("brief", "detailed", "polite", "blunt", "json", "plain")

config = RewardModel(
    model=Model(path="tuner:tiny"),  # full-parameter: as fast as an adapter on so few weights
    conditions={name: f"tuner:twins/{name}.txt" for name in CONDITIONS},
    data=Preferences(
        # twins, and pairs with answers in no particular tone, which the policy of quickstart_ppo produces, too
        files=("tuner:twins/train.jsonl", "tuner:manners/pairs.jsonl"),
        test_files=("tuner:twins/test.jsonl",),
        template="internlm2",
        max_length=128,
    ),
    optimizer=AdamW(lr=2e-3, weight_decay=0.01),
    schedule=Cosine(warmup=0.05, final=0.1),
    tokens_per_step=1_024,
    tokens_per_pass=1_024,
    epochs=2.5,
    precision="fp32",
    gradient_checkpointing=False,
)
