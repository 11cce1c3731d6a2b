"""DPO: InternLM2-7B trained directly on preferences, without a reward model, with QLoRA on a single GPU."""

from tuner.config import DPO, AdamW, LoRA, Model, Preferences, Source, Split

config = DPO(
    model=Model(path="internlm/internlm2-chat-7b-sft", quantization="nf4"),
    adapter=LoRA(r=64, alpha=16),
    data=Preferences(
        files=(Source(path="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs"),),
        template="internlm2",
        too_long="cut",
        incomparable="drop",
        split=Split(validation=0.005, test=0.01),
    ),
    optimizer=AdamW(lr=5e-6, bits=8, paged=True),
    pairs_per_step=64,
    pairs_per_pass=2,
)
