"""SFT: InternLM3-8B-Instruct fine-tuned further, with QLoRA on a single small GPU."""

from tuner.config import SFT, AdamW, Chat, LoRA, Model

config = SFT(
    model=Model(path="internlm/internlm3-8b-instruct", quantization="nf4"),
    adapter=LoRA(r=64, alpha=16, dropout=0.1),
    data=Chat(files=("tatsu-lab/alpaca",), template="internlm2"),
    optimizer=AdamW(lr=2e-4, bits=8, paged=True),
    epochs=3,
)
