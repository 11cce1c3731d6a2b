"""Log-probabilities of a prompt's tokens. Shapes: T tokens, D hidden size, C tokens of a chunk, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from tuner.models.forward import logits_of
from tuner.models.live_batch import Token, described

_CHUNK = 256
"""Tokens whose logits are held at a time."""


@torch.no_grad()
def prompt_logprobs(
    transformer: PreTrainedModel, prompt: Sequence[int], num_likeliest: int = 0
) -> list[Token | None]:
    """The prompt's tokens, each as likely as those before it make it; None for the first. Inside `unpacked`."""
    tokens_T = torch.tensor(prompt, device=transformer.device)
    backbone = transformer.get_decoder()
    states_TD = backbone(input_ids=tokens_T[None], use_cache=False).last_hidden_state[0]
    tokens: list[Token | None] = [None]
    for start in range(1, len(prompt), _CHUNK):
        targets_C = tokens_T[start : start + _CHUNK]
        logits_CV = logits_of(transformer, states_TD[start - 1 : start - 1 + len(targets_C)])
        tokens += described(logits_CV, targets_C, [num_likeliest] * len(targets_C))
    return tokens
