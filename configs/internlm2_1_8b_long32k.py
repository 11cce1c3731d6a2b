"""Long context: InternLM2-1.8B continued to 32k tokens at the report's RoPE base, half of the tokens in short rows.

The base is new to a model that was trained on 4k tokens at 50,000; the released one goes on at its own.
"""

from tuner.config import SFT, AdamW, Cosine, Model, Rope, ShortRows, Split, Text

config = SFT(
    model=Model(path="internlm/internlm2-1_8b", rope=Rope(base=1e6, length=32_768)),
    data=Text(
        files=("data/pretrain/*.jsonl",),
        max_length=32_768,
        short_rows=ShortRows(below=4_096, share=0.5),
        split=Split(validation=0.01),
    ),
    optimizer=AdamW(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, bits=8),
    schedule=Cosine(warmup=0.01, final=0.1),
    tokens_per_step=128 * 32_768,
    tokens_per_pass=32_768,
)
