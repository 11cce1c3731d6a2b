"""DPO: SmolLM2-135M trained directly on preferences, with LoRA; a few steps run on a laptop's CPU."""

from tuner.config import DPO, AdamW, LoRA, Model, Preferences, Source, Split

config = DPO(
    model=Model(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
    adapter=LoRA(r=16, alpha=32),
    data=Preferences(
        files=(Source(path="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs"),),
        template="chatml",
        max_length=1024,
        too_long="drop",
        incomparable="drop",
        split=Split(validation=0.005, test=0.01),
    ),
    optimizer=AdamW(lr=5e-5),
    pairs_per_step=32,
    pairs_per_pass=2,
)
