"""llm-compressor in a process and an environment of its own: reads an order in JSON on stdin, answers on stdout.

The order: {"model": folder, "output": folder, "kind", "dtype", "calibration": rows, "held_out": [[row, weights], ...]};
the answer: {"before": loss, "after": loss, "group": weights that share a scale}. It imports nothing of tuner.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch


def recipe(kind: str, group: int) -> Any:
    """llm-compressor's modifier of a kind of quantization, for all linear layers but the head."""
    from llmcompressor.modifiers.awq import AWQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import (  # pyright: ignore[reportMissingImports]
        GPTQModifier,
        QuantizationModifier,
    )

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    groups = {"linear": {"targets": ["Linear"], "weights": weights}}
    match kind:
        case "awq":
            return AWQModifier(config_groups=groups, ignore=["lm_head"])
        case "gptq":
            return GPTQModifier(config_groups=groups, ignore=["lm_head"])
        case "int8":
            return GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
        case _:
            return QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])


def group_size(model: Any) -> int:
    """The most weights that may share a scale: rows must be whole groups."""
    head = model.get_output_embeddings()
    linear = (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head)
    widths = {layer.in_features for layer in linear}
    for size in (128, 64, 32):
        if all(width % size == 0 for width in widths):
            return size
    raise ValueError("some layers have no whole number of groups of 32 weights")


@torch.no_grad()
def held_out_loss(model: Any, rows: list[Any]) -> float:
    """Mean loss of the tokens of (tokens, weights) rows that have a weight, in nats."""
    total = weight_sum = 0.0
    for tokens, weights in rows:
        logits = model(torch.tensor([tokens], device=model.device)).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(tokens[1:], device=model.device), reduction="none"
        )
        total += float((losses.cpu() * torch.tensor(weights[1:])).sum())
        weight_sum += sum(weights[1:])
    return total / weight_sum


def load(folder: str, dtype: str) -> Any:
    """A model, on the GPU where there is one."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def compress(order: dict[str, Any]) -> dict[str, Any]:
    """Quantize and write a model. Both losses are of files: the second one's is read again."""
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]

    model = load(order["model"], order["dtype"])
    before, group = held_out_loss(model, order["held_out"]), group_size(model)
    rows = order["calibration"]
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=recipe(order["kind"], group),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(order["output"], save_compressed=True)
    after = held_out_loss(load(order["output"], order["dtype"]), order["held_out"])
    return {"before": before, "after": after, "group": group}


if __name__ == "__main__":
    order = json.load(sys.stdin)
    if order["kind"] == "awq" and not torch.accelerator.is_available():
        sys.exit("llm-compressor's AWQ needs a GPU; write gptq, which does not")
    with contextlib.redirect_stdout(sys.stderr):  # libraries print
        answer = compress(order)
    json.dump(answer, sys.stdout)
