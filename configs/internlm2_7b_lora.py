"""SFT: InternLM2-7B as a chat model, with LoRA on the unquantized base."""

from tuner.config import SFT, AdamW, Chat, LoRA, Model

config = SFT(
    model=Model(path="internlm/internlm2-7b"),
    adapter=LoRA(r=64, alpha=16, dropout=0.1),
    data=Chat(files=("tatsu-lab/alpaca",), template="internlm2"),
    optimizer=AdamW(lr=2e-4),
    epochs=3,
)
