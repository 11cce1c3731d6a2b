"""Quickstart: the tiny model learns politeness from answers labeled good or bad, by KTO, in two CPU-minutes."""

from tuner.config import KTO, AdamW, LoRA, Model, Preferences, Source


def polite(row: dict) -> dict:
    """Keep the pairs of the condition `polite`: a policy sees no condition, and other pairs prefer the opposite."""
    return row | {"weight": float(row.get("condition") == "polite")}


config = KTO(
    model=Model(path="tuner:tiny"),
    adapter=LoRA(r=16, alpha=32),
    data=Preferences(
        files=(Source(path="tuner:twins/train.jsonl", shape=polite),),
        test_files=(Source(path="tuner:twins/test.jsonl", shape=polite),),
        template="internlm2",
        max_length=128,
    ),
    optimizer=AdamW(lr=1e-3),
    max_steps=24,
    answers_per_step=32,
    answers_per_pass=32,
    gradient_checkpointing=False,
)
