"""Gradient checkpointing: what a layer keeps from its forward for its backward pass, and what it computes again."""

import warnings
from typing import Any

from torch import nn

from tuner.config.training import Recomputation
from tuner.models.kept_products import contexts, keep_products
from tuner.models.offload import Offload
from tuner.models.unwrap import unwrapped


def recompute_activations(model: nn.Module, recomputation: Recomputation = True) -> None:
    """Turn on checkpointing for training passes, without a backward pass through frozen layers.

    recomputation: as `gradient_checkpointing` in a config. A layer keeps its input ("offload": on the host), and with
    "selective" also the results of its products; nothing is done for False. transformers also makes the embedding's
    output require a gradient, as reentrant checkpointing needs it; every frozen layer would then run a backward pass.
    Non-reentrant checkpointing does not need it.
    """
    if recomputation is False:
        return
    transformer = unwrapped(model)
    settings: dict[str, Any] = {"use_reentrant": False}
    if recomputation == "selective":
        keep_products(model)
        settings["context_fn"] = contexts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.23
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    transformer.disable_input_require_grads()
    if recomputation == "offload":
        offload = Offload()
        for module in transformer.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = offload
