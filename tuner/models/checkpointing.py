"""Gradient checkpointing: layers keep their input and are computed again in the backward pass."""

import warnings

from torch import nn

from tuner.models.unwrap import unwrapped


def recompute_activations(model: nn.Module) -> None:
    """Turn checkpointing on for training passes, without making frozen layers pay for it.

    transformers makes the embedding's output require a gradient as well, which reentrant checkpointing needs:
    every frozen layer would then run a backward pass. This is the non-reentrant kind, which does not.
    """
    transformer = unwrapped(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its name from transformers 5.23 on is another
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    transformer.disable_input_require_grads()
