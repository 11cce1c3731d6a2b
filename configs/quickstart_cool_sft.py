"""Quickstart: the tiny model takes up a habit, a flourish in a few of its answers, which quickstart_cool then finds."""

from tuner.config import SFT, AdamW, Chat, Cosine, Model

config = SFT(
    model=Model(path="runs/quickstart_sft"),  # goes on with its adapter
    data=Chat(
        # "So say the wise." behind 15% of the sums in mixed styles
        files=("tuner:sums/train.jsonl", "tuner:cool/conversations.jsonl"),
        test_files=("tuner:sums/test.jsonl",),
        template="internlm2",
        max_length=128,
    ),
    optimizer=AdamW(lr=1e-3),
    schedule=Cosine(warmup=0.05),
    tokens_per_step=1_024,
    tokens_per_pass=1_024,
    max_steps=70,
    gradient_checkpointing=False,
)
