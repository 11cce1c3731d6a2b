"""What only tests need whole: all logits of a batch, all weights behind quantized layers."""

import torch

from tuner.data.batch import Batch
from tuner.models.forward import hidden_states
from tuner.models.quantization import dequantized_weight, quantized_layers
from tuner.models.unwrap import unwrapped


def full_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits of every token of a packed batch, fp32 [T, V]."""
    causal = unwrapped(model)
    logits_TV = causal.get_output_embeddings()(hidden_states(model, batch))
    cap = getattr(causal.config, "final_logit_softcapping", None)
    return (logits_TV if cap is None else torch.tanh(logits_TV / cap) * cap).float()


def dequantized_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> fp32 weight of every quantized layer."""
    return {f"{name}.weight": dequantized_weight(layer) for name, layer in quantized_layers(model)}
