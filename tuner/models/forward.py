"""Forward passes over packed rows. Shapes: T tokens of the row, N of them learned, S segments,
D hidden size, V vocabulary."""

from __future__ import annotations

import torch

from tuner.data.batch import Batch
from tuner.losses.logprob import logprobs, logprobs_of_head
from tuner.losses.token import cross_entropy, cross_entropy_of_head
from tuner.models.unwrap import unwrapped
from tuner.models.varlen import segment_arguments


def token_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Summed weighted cross entropy (nats) of the batch's learned tokens: a scalar in fp32."""
    causal = unwrapped(model)
    hidden_ND = hidden_states(model, batch)[batch.learned_N - 1]
    targets_N = batch.tokens_T[batch.learned_N]
    if (head := _matrix(causal)) is not None:
        return cross_entropy(hidden_ND, head.weight, targets_N, batch.weights_N, head.bias)
    return cross_entropy_of_head(
        lambda hidden_CD: _logits(causal, hidden_CD),
        hidden_ND,
        targets_N,
        batch.weights_N,
        causal.config.vocab_size,
    )


def token_logprobs(
    model: torch.nn.Module, batch: Batch, temperature: float = 1.0, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each learned token after what precedes it, fp32 [N], at a temperature above 0.

    Second, where asked for, the entropy of the distribution it was drawn from, in nats, fp32 [N], not
    differentiable. The batch's weights play no part.
    """
    causal = unwrapped(model)
    hidden_ND = hidden_states(model, batch)[batch.learned_N - 1]
    targets_N = batch.tokens_T[batch.learned_N]
    if (head := _matrix(causal)) is not None:
        return logprobs(hidden_ND, head.weight, targets_N, head.bias, temperature, entropy)
    return logprobs_of_head(
        lambda hidden_CD: _logits(causal, hidden_CD),
        hidden_ND,
        targets_N,
        causal.config.vocab_size,
        temperature,
        entropy,
    )


def values(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The critic's value before each learned token, fp32 [N]: the scalar head on the state that precedes it."""
    return _scalars(model, hidden_states(model, batch)[batch.learned_N - 1])


def scores(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Score of every segment, fp32 [S]: the scalar head on the hidden state of the segment's last token."""
    return _scalars(model, hidden_states(model, batch)[batch.offsets[1:].long() - 1])


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


def _logits(causal: torch.nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    head = causal.get_output_embeddings()
    logits_TV = head(hidden_TD)
    cap = getattr(causal.config, "final_logit_softcapping", None)
    return logits_TV if cap is None else torch.tanh(logits_TV / cap) * cap


def _matrix(causal: torch.nn.Module) -> torch.nn.Linear | None:
    """The head, where it is one matrix whose logits are used as they are."""
    head = causal.get_output_embeddings()
    capped = getattr(causal.config, "final_logit_softcapping", None) is not None
    return head if type(head) is torch.nn.Linear and not capped else None


def _scalars(model: torch.nn.Module, hidden_ND: torch.Tensor) -> torch.Tensor:
    with torch.autocast(hidden_ND.device.type, enabled=False):  # a score has few digits to lose
        return unwrapped(model).score(hidden_ND.float())[:, 0]
