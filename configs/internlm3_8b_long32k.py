"""Long context: InternLM3-8B fine-tuned further on conversations of up to 32k tokens, half of the tokens in short ones.

Its own RoPE base (5e7) and dynamic scaling stay as they are; `model.rope` goes beyond.
"""

from tuner.config import SFT, AdamW, Chat, Cosine, Model, ShortRows, Source

config = SFT(
    model=Model(path="internlm/internlm3-8b-instruct"),
    data=Chat(
        files=(Source(path="data/long/*.jsonl"), Source(path="tatsu-lab/alpaca")),
        template="internlm2",
        max_length=32_768,
        too_long="drop",
        short_rows=ShortRows(below=4_096, share=0.5),
    ),
    optimizer=AdamW(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, bits=8),
    schedule=Cosine(warmup=0.025, final=0.1),
    tokens_per_step=64 * 32_768,
    tokens_per_pass=32_768,
)
