"""SFT: InternLM2-20B as a chat model, full-parameter training on eight GPUs of 80 GB, which hold the model together."""

from tuner.config import SFT, AdamW, Chat, Cosine, Evaluation, Model, Parallel

config = SFT(
    model=Model(path="internlm/internlm2-20b"),
    data=Chat(files=("tatsu-lab/alpaca",), template="internlm2", max_length=8192),
    optimizer=AdamW(lr=4e-5, betas=(0.9, 0.95), weight_decay=0.01),
    schedule=Cosine(warmup=0.025, warmup_start=1 / 40, final=0.15),
    tokens_per_step=256 * 8192,
    tokens_per_pass=8192,
    # answers are sampled by the whole model, which does not fit one of them
    evaluation=Evaluation(samples=0),
    parallel=Parallel(shard=8),
)
