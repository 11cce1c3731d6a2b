"""Quickstart: the embedded tiny model learns from pairs to be polite, by DPO on TRL, in a minute on a laptop's CPU."""

from tuner.config import DPO, AdamW, Constant, LoRA, Model, Preferences, Source


def polite(row: dict) -> dict:
    """Keep the twins that ask for politeness: a policy sees no conditions, and the other half says the opposite."""
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
