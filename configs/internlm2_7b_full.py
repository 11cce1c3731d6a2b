"""SFT: InternLM2-7B as a chat model, full-parameter training, packed to 32k tokens (XTuner's recipe for InternLM2)."""

from tuner.config import SFT, AdamW, Chat, Cosine, Model

config = SFT(
    model=Model(path="internlm/internlm2-7b"),
    data=Chat(files=("tatsu-lab/alpaca",), template="internlm2", max_length=32_768),
    optimizer=AdamW(lr=4e-5, betas=(0.9, 0.95), weight_decay=0.01, bits=8),
    schedule=Cosine(warmup=0.025, warmup_start=1 / 40, final=0.15),
    tokens_per_step=64 * 32_768,
    tokens_per_pass=32_768,
)
