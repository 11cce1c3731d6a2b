"""Forward passes over packed rows.

Shapes: T tokens of the row, N of them with a loss, S segments, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tuner.data.batch import Batch
from tuner.losses.chunked_softmax import chunk_size
from tuner.losses.logprob import entropies_of_head, logprobs, logprobs_of_head
from tuner.losses.token import cross_entropy, cross_entropy_of_head
from tuner.models.positions import check_length
from tuner.models.segment_rope import part_positions
from tuner.models.sharding import gathered
from tuner.models.shared_rows import RowPart
from tuner.models.unwrap import unwrapped
from tuner.models.varlen import segment_arguments


@gathered
def token_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Weighted sum of the cross entropy (nats) of the tokens the loss is taken on: a scalar in fp32."""
    causal = unwrapped(model)
    # the state before a token predicts it; a segment's first token never has a loss (make_batch), else it
    # would be predicted from the sample packed before
    states = _States.at(batch.learned_N - 1, model, batch)
    targets_N, weights_N = batch.tokens_T[batch.learned_N[states.own]], batch.weights_N[states.own]
    # the fused loss multiplies by head.weight itself, so it serves plain matrices only
    if (head := _matrix(causal)) is not None:
        loss = cross_entropy(states.hidden_ND, head.weight, targets_N, weights_N, head.bias)
    else:
        loss = cross_entropy_of_head(
            lambda hidden_CD: logits_of(causal, hidden_CD),
            states.hidden_ND,
            targets_N,
            weights_N,
            causal.config.vocab_size,
        )
    return states.part.summed(loss)


@gathered
def token_logprobs(
    model: torch.nn.Module, batch: Batch, temperature: float = 1.0, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability (nats) of each token the loss is taken on, fp32 [N], at a temperature above 0; and its entropy.

    entropy: also return the entropy of each next-token distribution in nats, fp32 [N], differentiable where gradients
    are enabled; else None. The batch's weights are ignored.
    """
    causal = unwrapped(model)
    states = _States.at(batch.learned_N - 1, model, batch)
    hidden_ND, vocabulary = states.hidden_ND, causal.config.vocab_size
    targets_N = batch.tokens_T[batch.learned_N[states.own]]
    learned = entropy and torch.is_grad_enabled()
    measured = entropy and not learned

    def logits(hidden_CD: torch.Tensor) -> torch.Tensor:
        return logits_of(causal, hidden_CD)

    if (head := _matrix(causal)) is not None:
        logprobs_N, entropies_N = logprobs(
            hidden_ND, head.weight, targets_N, head.bias, temperature, measured
        )
    else:
        logprobs_N, entropies_N = logprobs_of_head(
            logits, hidden_ND, targets_N, vocabulary, temperature, measured
        )
    if learned:
        entropies_N = entropies_of_head(logits, hidden_ND, vocabulary, temperature)
    return states.joined(logprobs_N), None if entropies_N is None else states.joined(entropies_N)


@gathered
@torch.no_grad()
def greedy_logprobs(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (nats) of each token the loss is taken on, fp32 [N], and whether it is the most likely, bool [N].

    Of two tokens that are equally likely, the one with the smaller id is the most likely, as in greedy decoding.
    """
    causal = unwrapped(model)
    states = _States.at(batch.learned_N - 1, model, batch)
    targets_N = batch.tokens_T[batch.learned_N[states.own]]
    size = chunk_size(causal.config.vocab_size)
    chunks = [
        _greedy_chunk(logits_of(causal, hidden_CD), targets_C)
        for hidden_CD, targets_C in zip(
            torch.split(states.hidden_ND, size), torch.split(targets_N, size), strict=True
        )
    ]
    logprobs_N, greedy_N = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return states.joined(logprobs_N), states.joined(greedy_N.float()) > 0


def _greedy_chunk(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs_C = logits_CV.float().log_softmax(-1).gather(1, targets_C[:, None])[:, 0]
    return logprobs_C, logits_CV.argmax(-1) == targets_C


@gathered
def values(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The critic's value before each token the loss is taken on, fp32 [N]: the scalar head at the preceding token."""
    states = _States.at(batch.learned_N - 1, model, batch)
    return states.joined(_scalars(model, states.hidden_ND))


@gathered
def scores(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Score of every segment, fp32 [S]: the scalar head at the segment's last token."""
    states = _States.at(batch.offsets[1:].long() - 1, model, batch)
    return states.joined(_scalars(model, states.hidden_ND))


def hidden_states(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Outputs of the last layer after the final norm, [T, D]; each segment attends to itself only.

    Of a row that several processes compute together, those of this one's part. Raises UserError for a segment that is
    longer than learned positions go.
    """
    return _part_states(model, RowPart.of(model, batch))


@dataclass(frozen=True)
class _States:
    """Last hidden states at some places of a row; of several processes' row, at those in this one's part."""

    part: RowPart
    own: slice
    """Which of the places are in this part."""
    hidden_ND: torch.Tensor
    count: int
    """Places in the whole row."""

    @classmethod
    def at(cls, places_N: torch.Tensor, model: torch.nn.Module, batch: Batch) -> _States:
        """places_N: ascending. Selected before a head is applied: logits of all tokens would dominate memory."""
        part = RowPart.of(model, batch)
        own, local_N = part.places(places_N)
        return cls(part, own, _part_states(model, part)[local_N], len(places_N))

    def joined(self, values_N: torch.Tensor) -> torch.Tensor:
        """Values at all places of the row, from those at this part's."""
        return self.part.joined(values_N, self.own, self.count)


def _part_states(model: torch.nn.Module, part: RowPart) -> torch.Tensor:
    row, (first, end) = part.row, part.bounds
    check_length(model, row.longest, "; shorten the longest")
    backbone = unwrapped(model).get_decoder()
    positions_1T = row.positions_T[None]
    if part.processes is not None:
        positions_1T = part_positions(row.positions_T, first, end)
    output = backbone(
        input_ids=row.tokens_T[None, first:end],
        position_ids=positions_1T,
        # a cache would hold every layer's keys and values until the backward pass is done
        use_cache=False,
        **segment_arguments(row),
        **({} if part.processes is None else {"row_processes": part.processes}),
    )
    return output.last_hidden_state[0]


def logits_of(causal: PreTrainedModel, hidden_TD: torch.Tensor) -> torch.Tensor:
    head = causal.get_output_embeddings()
    assert head is not None
    logits_TV = head(hidden_TD)
    cap = getattr(causal.config, "final_logit_softcapping", None)
    return logits_TV if cap is None else torch.tanh(logits_TV / cap) * cap


def _matrix(causal: PreTrainedModel) -> torch.nn.Linear | None:
    """The language head, where it is a plain matrix without a cap on its logits; else None."""
    head = causal.get_output_embeddings()
    capped = getattr(causal.config, "final_logit_softcapping", None) is not None
    # exactly nn.Linear: peft's wrapper has a .weight, too, the frozen base's, and with it the head's adapter
    # would silently take no part
    return head if type(head) is torch.nn.Linear and not capped else None


def _scalars(model: torch.nn.Module, hidden_ND: torch.Tensor) -> torch.Tensor:
    with torch.autocast(hidden_ND.device.type, enabled=False):  # in bf16 close scores would be equal
        return unwrapped(model).score(hidden_ND.float())[:, 0]
