"""SFT: SmolLM2-135M-Instruct on 200 rows of one's own, with LoRA; minutes on a CPU (docs/handing_over.md)."""

from tuner.config import SFT, AdamW, Chat, LoRA, Model

config = SFT(
    model=Model(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
    adapter=LoRA(r=16, alpha=32),
    data=Chat(
        files=("tickets/train.jsonl",), test_files=("tickets/test.jsonl",), template="chatml", max_length=256
    ),
    optimizer=AdamW(lr=1e-3),
    tokens_per_step=1_024,
    tokens_per_pass=512,
    epochs=2,
    gradient_checkpointing=False,
)
