"""Quickstart: the tiny model learns to add numbers in a chat, with QLoRA, in one to three minutes on a laptop's CPU."""

from tuner.config import SFT, AdamW, Chat, Cosine, Evaluation, LoRA, Model

config = SFT(
    model=Model(path="tuner:tiny", quantization="nf4"),
    adapter=LoRA(r=64, alpha=128),
    data=Chat(
        # sums alone, and with a system turn in mixed styles, from which quickstart_ppo selects
        files=("tuner:sums/train.jsonl", "tuner:manners/train.jsonl"),
        test_files=("tuner:sums/test.jsonl",),
        template="internlm2",
        max_length=128,
    ),
    optimizer=AdamW(lr=4e-3),
    schedule=Cosine(warmup=0.05),
    tokens_per_step=1_024,
    tokens_per_pass=1_024,
    epochs=3,
    gradient_checkpointing=False,
    evaluation=Evaluation(score="exact", max_new_tokens=16),
)
