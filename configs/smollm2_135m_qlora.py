"""SFT: SmolLM2-135M as a chat model, with QLoRA; runs on a laptop's CPU."""

from tuner.config import SFT, Chat, LoRA, Model

config = SFT(
    model=Model(path="HuggingFaceTB/SmolLM2-135M", quantization="nf4"),
    adapter=LoRA(r=16, alpha=16),
    data=Chat(files=("tatsu-lab/alpaca",), template="chatml", max_length=1024, too_long="drop"),
    tokens_per_step=8_192,
    tokens_per_pass=2_048,
)
