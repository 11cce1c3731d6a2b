"""Gradient checkpointing: layers keep only their input and are recomputed in the backward pass."""

import warnings

from torch import nn

from tuner.models.unwrap import unwrapped


def recompute_activations(model: nn.Module) -> None:
    """Turn on checkpointing for training passes, without a backward pass through frozen layers.

    transformers also makes the embedding's output require a gradient, as reentrant checkpointing needs it; every
    frozen layer would then run a backward pass. Non-reentrant checkpointing does not need it.
    """
    transformer = unwrapped(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.23
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    transformer.disable_input_require_grads()
