"""Forward passes over packed rows. Shapes: T tokens of the row, N of them learned, S segments,
D hidden size, V vocabulary."""

from __future__ import annotations

import torch

from tuner.data.batch import Batch
from tuner.losses.token import cross_entropy, cross_entropy_of_head
from tuner.models.unwrap import unwrapped
from tuner.models.varlen import segment_arguments


def token_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Summed weighted cross entropy (nats) of the batch's learned tokens: a scalar in fp32."""
    causal = unwrapped(model)
    hidden_ND = hidden_states(model, batch)[batch.learned_N - 1]
    targets_N = batch.tokens_T[batch.learned_N]
    head = causal.get_output_embeddings()
    if type(head) is torch.nn.Linear and not _reshapes_logits(causal):
        return cross_entropy(hidden_ND, head.weight, targets_N, batch.weights_N, head.bias)
    return cross_entropy_of_head(
        lambda hidden_CD: _logits(causal, hidden_CD),
        hidden_ND,
        targets_N,
        batch.weights_N,
        causal.config.vocab_size,
    )


def scores(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Score of every segment, fp32 [S]: the scalar head on the hidden state of the segment's last token."""
    last_SD = hidden_states(model, batch)[batch.offsets[1:].long() - 1]
    with torch.autocast(last_SD.device.type, enabled=False):  # a score has few digits to lose
        return unwrapped(model).score(last_SD.float())[:, 0]


def hidden_states(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Outputs of the last layer after its norm, [T, D]; each segment as if it were alone."""
    backbone = unwrapped(model).get_decoder()
    output = backbone(
        input_ids=batch.tokens_T[None],
        position_ids=batch.positions_T[None],
        use_cache=False,
        **segment_arguments(batch),
    )
    return output.last_hidden_state[0]


def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """All logits, fp32 [T, V]: for probes and comparisons of short rows, never for training."""
    return _logits(unwrapped(model), hidden_states(model, batch)).float()


def _logits(causal: torch.nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    head = causal.get_output_embeddings()
    logits_TV = head(hidden_TD)
    cap = getattr(causal.config, "final_logit_softcapping", None)
    return logits_TV if cap is None else torch.tanh(logits_TV / cap) * cap


def _reshapes_logits(causal: torch.nn.Module) -> bool:
    return getattr(causal.config, "final_logit_softcapping", None) is not None
