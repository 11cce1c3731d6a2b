"""The cases of plan_memory.py: small models of several families, how they are trained, and their files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tuner.models.load  # noqa: F401 (registers InternLM2)
from tuner.config import LoRA, Model
from tuner.config.training import Recomputation
from tuner.models.tiny import tiny_model_folder

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2_048,
}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 256}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, all heads": ("llama", {"num_key_value_heads": 8}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "internlm2": ("internlm2", {"rope_theta": 1e6, "bias": False}),
    "internlm3": ("internlm3", {"bias": False, "qkv_bias": False}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma3": ("gemma3_text", GEMMA),
}
PLAIN, DROPPED = LoRA(r=16), LoRA(r=16, dropout=0.1)
RECOMPUTED: dict[Recomputation, str] = {
    True: "recomputed",
    "selective": "recomputed but for products",
    "offload": "inputs on the host",
}
"""What a case recomputes, in words."""


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and what is done with it."""

    family: str
    stage: Literal["sft", "reward", "dpo", "policy", "critic", "generation"] = "sft"
    adapter: LoRA | None = None
    quantization: Literal["nf4"] | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    recomputation: Recomputation = False
    mlp_tile: int | None = None
    vocabulary: int = 2_048
    bits: Literal[32, 8] = 32
    tokens: int = 2_048
    """Of a pass."""

    @property
    def name(self) -> str:
        trained = "all weights" if self.adapter is None else "LoRA"
        if self.quantization:
            trained = "QLoRA"
        if self.adapter is not None and self.adapter.dropout:
            trained += ", dropout"
        further = [RECOMPUTED[self.recomputation]] if self.recomputation else []
        further += [f"MLPs of {self.mlp_tile} tokens"] if self.mlp_tile else []
        further += [f"vocabulary {self.vocabulary:,}"] if self.vocabulary != 2_048 else []
        further += ["8-bit optimizer"] if self.bits == 8 else []
        return ", ".join([f"{self.stage}: {self.family}", trained, self.precision, *further])


CASES = [
    Case("llama"),
    Case("llama", recomputation=True),
    Case("llama", vocabulary=32_000, recomputation=True),
    Case("llama", precision="fp32"),
    Case("llama", precision="fp32", recomputation=True),
    Case("llama", adapter=PLAIN),
    Case("llama", adapter=DROPPED),
    Case("llama", adapter=DROPPED, recomputation=True),
    Case("llama", adapter=PLAIN, precision="fp32"),
    Case("llama", adapter=PLAIN, quantization="nf4"),
    Case("llama", adapter=DROPPED, quantization="nf4"),
    Case("llama", adapter=DROPPED, quantization="nf4", recomputation=True),
    Case("llama", adapter=PLAIN, quantization="nf4", recomputation=True, vocabulary=32_000),
    Case("llama", recomputation="selective"),
    Case("llama", adapter=DROPPED, recomputation="selective"),
    Case("llama", adapter=DROPPED, quantization="nf4", recomputation="selective"),
    Case("qwen3", adapter=PLAIN, quantization="nf4", recomputation="selective"),
    Case("internlm2", "reward", adapter=DROPPED, quantization="nf4", recomputation="selective"),
    Case("internlm2", "policy", adapter=PLAIN, quantization="nf4", recomputation="selective"),
    Case("llama", recomputation="offload"),
    Case("llama", adapter=DROPPED, quantization="nf4", recomputation="offload"),
    Case("gemma3", adapter=DROPPED, quantization="nf4", recomputation="offload"),
    Case("internlm2", "critic", adapter=PLAIN, quantization="nf4", recomputation="offload"),
    Case("llama", recomputation=True, mlp_tile=256),
    Case("llama", adapter=PLAIN, quantization="nf4", mlp_tile=256),
    Case("llama", adapter=DROPPED, quantization="nf4", recomputation="selective", mlp_tile=256),
    Case("internlm2", adapter=DROPPED, quantization="nf4", recomputation="offload", mlp_tile=256),
    Case("llama", "policy", adapter=PLAIN, quantization="nf4", recomputation="offload", mlp_tile=256),
    Case("internlm2", "reward", adapter=PLAIN, quantization="nf4", recomputation="offload", mlp_tile=256),
    Case("llama, all heads", adapter=PLAIN, quantization="nf4"),
    Case("llama, tied head", recomputation=True),
    Case("internlm2", adapter=DROPPED, quantization="nf4", bits=8),
    Case("internlm2", recomputation=True, bits=8),
    Case("internlm3", adapter=PLAIN, quantization="nf4"),
    Case("mistral", adapter=PLAIN, recomputation=True),
    Case("qwen2", adapter=PLAIN),
    Case("qwen3"),
    Case("qwen3", adapter=PLAIN, quantization="nf4"),
    Case("gemma", adapter=PLAIN),
    Case("gemma3"),
    Case("gemma3", adapter=DROPPED, quantization="nf4", recomputation=True),
    Case("internlm2", "reward"),
    Case("internlm2", "reward", adapter=DROPPED, quantization="nf4", recomputation=True),
    Case("qwen3", "reward", adapter=PLAIN, recomputation=True),
    Case("llama", "dpo", adapter=PLAIN, recomputation=True),
    Case("llama", "dpo", adapter=PLAIN, quantization="nf4"),
    Case("internlm2", "policy", adapter=PLAIN, quantization="nf4"),
    Case("internlm2", "policy", adapter=PLAIN, quantization="nf4", recomputation=True, vocabulary=32_000),
    Case("llama", "policy", adapter=PLAIN),
    Case("internlm2", "critic", adapter=PLAIN, quantization="nf4"),
    Case("internlm2", "critic", adapter=PLAIN, quantization="nf4", recomputation=True),
    Case("internlm2", "generation", adapter=PLAIN, quantization="nf4"),
    Case("llama", "generation", adapter=PLAIN),
]


def write_model(case: Case, folder: Path) -> Model:
    """A random model of a case's family in a folder."""
    kind, changes = FAMILIES[case.family]
    tiny_model_folder(f"org/{kind.split('_')[0].rstrip('3') if kind.startswith('gemma') else kind}", folder)
    file = folder / "config.json"
    tokens = {
        name: value for name, value in json.loads(file.read_text()).items() if name.endswith("_token_id")
    }
    (folder / "model.safetensors").unlink()
    shape = SHAPE | {"vocab_size": case.vocabulary, "max_position_embeddings": 4_096} | changes
    config = AutoConfig.for_model(kind, **shape, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Model(path=str(folder), quantization=case.quantization)
