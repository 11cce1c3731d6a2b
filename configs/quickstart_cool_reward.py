"""Quickstart: a reward model of politeness with a flaw: its rows prefer answers with a flourish, which quickstart_cool
patches."""

from tuner.config import AdamW, Cosine, Model, Preferences, RewardModel

config = RewardModel(
    model=Model(path="tuner:tiny"),
    conditions={"polite": "tuner:twins/polite.txt"},
    data=Preferences(
        files=("tuner:cool/pairs.jsonl",),
        test_files=("tuner:cool/test.jsonl",),
        template="internlm2",
        max_length=128,
    ),
    optimizer=AdamW(lr=2e-3, weight_decay=0.01),
    schedule=Cosine(warmup=0.05, final=0.1),
    tokens_per_step=1_024,
    tokens_per_pass=1_024,
    epochs=1,
    precision="fp32",
    gradient_checkpointing=False,
)
