"""Test of a loaded model, before it is trained, that packed samples do not attend to each other."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from tuner.data.batch import Batch, make_batch
from tuner.errors import UserError
from tuner.models.forward import hidden_states
from tuner.models.load import Loaded
from tuner.models.unwrap import unwrapped
from tuner.models.varlen import NAME

LENGTHS = (5, 17, 9)
"""Tokens of the probe's segments."""
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.5}
"""Largest difference allowed, in standard deviations of the hidden states. A leak differs by about one; 8-bit layers
round their inputs by outliers of the whole batch (LLM.int8(), Dettmers et al., 2022)."""


@torch.no_grad()
def prove_isolation(loaded: Loaded, device: torch.device, autocast: AbstractContextManager[Any]) -> float:
    """Compare a packed row with its segments computed one by one under transformers' own attention.

    Returns the largest difference of the last hidden states in their standard deviations. Raises UserError above
    TOLERANCE.
    """
    model = loaded.model
    was_training = model.training
    model.eval()
    with autocast:
        difference = _largest_difference(model, _random_row(model, device))
    model.train(was_training)
    kind = "int8" if loaded.base.quantization == "int8" else loaded.precision
    if not difference <= TOLERANCE[kind]:  # NaN fails, too
        raise UserError(
            f"{type(unwrapped(model)).__name__}: packed samples do not come out as they do alone "
            f"(hidden states differ by {difference:.2g} standard deviations): tuner cannot pack this model's "
            "attention yet"
        )
    return difference


def _random_row(model: torch.nn.Module, device: torch.device) -> Batch:
    vocabulary = unwrapped(model).get_input_embeddings().weight.shape[0]
    # of its own: a draw from the global generators would change the run's dropout
    generator = np.random.default_rng(0)
    samples = [generator.integers(0, vocabulary, length).astype(np.int32) for length in LENGTHS]
    return make_batch([(tokens, np.ones(len(tokens), np.float32)) for tokens in samples]).to(device)


def _largest_difference(model: torch.nn.Module, batch: Batch) -> float:
    packed_TD = hidden_states(model, batch).float()
    plain = unwrapped(model)
    # another backend than the one tested, and without packing, so no fault of `varlen` can be in both
    plain.set_attn_implementation("sdpa")
    try:
        decoder = plain.get_decoder()
        alone = [decoder(input_ids=tokens[None], use_cache=False) for tokens in batch.tokens_T.split(LENGTHS)]
    finally:
        plain.set_attn_implementation(NAME)
    alone_TD = torch.cat([output.last_hidden_state[0].float() for output in alone])
    return float((packed_TD - alone_TD).abs().max() / alone_TD.std())
