"""Quickstart: the tiny model learns politeness from preference pairs, by DPO, in one to three minutes on a CPU."""

from tuner.config import DPO, AdamW, Constant, LoRA, Model, Preferences, Source


def polite(row: dict) -> dict:
    """Keep the pairs of the condition `polite`: a policy sees no condition, and other pairs prefer the opposite."""
    return row | {"weight": float(row.get("condition") == "polite")}


config = DPO(
    model=Model(path="tuner:tiny"),
    adapter=LoRA(r=16, alpha=32),
    data=Preferences(
        files=(Source(path="tuner:twins/train.jsonl", shape=polite),),
        test_files=(Source(path="tuner:twins/test.jsonl", shape=polite),),
        template="internlm2",
        max_length=128,
    ),
    optimizer=AdamW(lr=1e-3),
    schedule=Constant(),
    pairs_per_step=16,
    pairs_per_pass=16,
    gradient_checkpointing=False,
)
