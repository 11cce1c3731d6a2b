"""SFT: Mistral-7B-v0.3 as a chat model, with QLoRA on a single small GPU."""

from tuner.config import SFT, AdamW, Chat, LoRA, Model

config = SFT(
    model=Model(path="mistralai/Mistral-7B-v0.3", quantization="nf4"),
    adapter=LoRA(r=64, alpha=16, dropout=0.1),
    data=Chat(files=("tatsu-lab/alpaca",), template="mistral"),
    optimizer=AdamW(lr=2e-4, bits=8, paged=True),
    epochs=3,
)
