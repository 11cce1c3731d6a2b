"""Test of a loaded model, before it is trained, that packed samples do not attend to each other.

Shapes: T tokens of the packed row, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner.data.batch import Batch, make_batch
from tuner.errors import UserError
from tuner.models.arithmetic import product_precision
from tuner.models.forward import hidden_states
from tuner.models.load import Loaded
from tuner.models.sharding import gathered
from tuner.models.unwrap import unwrapped
from tuner.models.varlen import NAME

LENGTHS = (5, 17, 9)
"""Tokens of the probe's segments."""
MARGIN = 4.0
"""Largest error allowed, in units of the model's own rounding."""


@torch.no_grad()
def prove_isolation(loaded: Loaded, device: torch.device, autocast: AbstractContextManager[Any]) -> float:
    """Compare a packed row with its segments computed one by one under transformers' own attention.

    Returns the relative error of the segment that differs most, by the norm of its last hidden states. Raises UserError
    where that is more than MARGIN times what rounding does to this model here: packed and alone are computed by
    different kernels, so no fixed bound tells a leak from rounding in every precision, quantization and depth.
    """
    model, plain = loaded.model, unwrapped(loaded.model)
    was_training = model.training
    model.eval()
    batch = random_row(model, device, LENGTHS)
    with autocast:
        packed_TD = gathered(hidden_states)(model, batch).float()
        # another backend than the one tested, and without packing, so no fault of `varlen` can be in both
        plain.set_attn_implementation("sdpa")
        try:
            alone_TD, batched_TD = _one_by_one(plain, batch), _in_a_batch(plain, batch)
        finally:
            plain.set_attn_implementation(NAME)
    model.train(was_training)
    error = _relative_error(packed_TD, alone_TD)
    rounding = max(_relative_error(batched_TD, alone_TD), _expected_rounding(loaded))
    if not error <= MARGIN * rounding:  # NaN fails, too
        raise UserError(
            f"{type(plain).__name__}: packed samples do not come out as they do alone (hidden states differ by "
            f"{error:.2g} of their norm, rounding accounts for {rounding:.2g}): tuner cannot pack this model's "
            "attention yet"
        )
    return error


def random_row(model: torch.nn.Module, device: torch.device, lengths: Sequence[int]) -> Batch:
    """A packed row of random tokens in segments of these lengths, the same for every model of a vocabulary."""
    vocabulary = unwrapped(model).get_input_embeddings().weight.shape[0]
    # of its own: a draw from the global generators would change the run's dropout
    generator = np.random.default_rng(0)
    samples = [generator.integers(0, vocabulary, length).astype(np.int32) for length in lengths]
    return make_batch([(tokens, np.ones(len(tokens), np.float32)) for tokens in samples]).to(device)


@gathered
def _one_by_one(plain: Any, batch: Batch) -> Tensor:
    """Last hidden states of each segment in a pass of its own, fp32 [T, D]."""
    decoder, segments = plain.get_decoder(), batch.tokens_T.split(LENGTHS)
    outputs = [decoder(input_ids=tokens[None], use_cache=False) for tokens in segments]
    return torch.cat([output.last_hidden_state[0].float() for output in outputs])


@gathered
def _in_a_batch(plain: Any, batch: Batch) -> Tensor:
    """The same in one pass: other shapes take other kernels, and what they differ by is rounding."""
    longest, segments = max(LENGTHS), batch.tokens_T.split(LENGTHS)
    # Shorter segments go on with their own tokens: attention is causal, so what follows changes nothing.
    rows = torch.stack([tokens.repeat(math.ceil(longest / len(tokens)))[:longest] for tokens in segments])
    states = plain.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state.float()
    return torch.cat([row[: len(tokens)] for row, tokens in zip(states, segments, strict=True)])


def _relative_error(states_TD: Tensor, exact_TD: Tensor) -> float:
    """Of the segment that differs most. By norm, for single elements are outliers of the model, not of the error."""
    segments = zip(states_TD.split(LENGTHS), exact_TD.split(LENGTHS), strict=True)
    return max(float((states - exact).norm() / exact.norm()) for states, exact in segments)


def _expected_rounding(loaded: Loaded) -> float:
    """Least relative error by the arithmetic: two products a layer are added to the residual stream and rounded.

    Each is a sum over the hidden size in fp32, rounded to the model's precision; roundings are as good as independent
    (Higham and Mary, SIAM J. Sci. Comput. 2019).
    """
    config = unwrapped(loaded.model).config.get_text_config(decoder=True)
    device = next(loaded.model.parameters()).device
    in_bf16 = product_precision(device, loaded.precision) == "bf16"
    rounding = torch.finfo(torch.bfloat16 if in_bf16 else torch.float32).eps
    product = math.sqrt(config.hidden_size) * torch.finfo(torch.float32).eps + rounding
    return math.sqrt(2 * config.num_hidden_layers) * product / 2
