"""Long context: Llama-3-8B continued from 8k to 32k tokens by YaRN; rows within 8k keep their frequencies."""

from tuner.config import SFT, AdamW, Cosine, Model, Rope, ShortRows, Split, Text

config = SFT(
    model=Model(
        path="meta-llama/Meta-Llama-3-8B", rope=Rope(scaling="yarn", length=32_768, mixed_window=True)
    ),
    data=Text(
        files=("data/pretrain/*.jsonl",),
        max_length=32_768,
        short_rows=ShortRows(below=8_192, share=0.5),
        split=Split(validation=0.01),
    ),
    optimizer=AdamW(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, bits=8),
    schedule=Cosine(warmup=0.01, final=0.1),
    tokens_per_step=128 * 32_768,
    tokens_per_pass=32_768,
)
