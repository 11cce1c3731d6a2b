"""Continued pre-training: InternLM2-7B on raw text, full-parameter training, documents of up to 32k tokens."""

from tuner.config import SFT, AdamW, Cosine, Model, Split, Text

config = SFT(
    model=Model(path="internlm/internlm2-7b"),
    data=Text(files=("data/pretrain/*.jsonl",), max_length=32_768, split=Split(validation=0.01)),
    optimizer=AdamW(lr=3e-5, betas=(0.9, 0.95), weight_decay=0.1, bits=8),
    schedule=Cosine(warmup=0.01, final=0.1),
    tokens_per_step=32 * 32_768,
    tokens_per_pass=32_768,
)
