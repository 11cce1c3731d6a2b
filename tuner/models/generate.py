"""Answers from a model: in batches for evaluation and samples, piece by piece for chat."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tuner.models.unwrap import unwrapped

_ATTENTION = "sdpa"  # takes the padding mask and the cache; `varlen` is for packed rows


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    end_ids: Collection[int],
    pad_id: int,
    batch_size: int = 32,
    seed: int = 0,
) -> list[list[int]]:
    """Token ids answering each prompt, without the prompt and without the end token.

    Greedy at temperature 0, where the answers do not depend on the batch; else sampled from the top_p
    nucleus, from `seed`. pad_id fills shorter prompts on the left and may be any token. The model comes back
    as it was: attention, training mode and the global random state are untouched. Raises ValueError on an
    empty prompt.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("an empty prompt cannot be answered: begin it with the begin-of-sequence token")
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=pad_id,
        **_sampling(temperature, top_p),
    )
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    with generating(model) as transformer, _seeded(transformer.device, seed):
        for start in range(0, len(by_length), batch_size):
            indices = by_length[start : start + batch_size]
            tokens, mask = _left_padded([prompts[index] for index in indices], pad_id, transformer.device)
            output = transformer.generate(input_ids=tokens, attention_mask=mask, generation_config=settings)
            for index, row in zip(indices, output[:, tokens.shape[1] :].tolist(), strict=True):
                answers[index] = _until_end(row, end_ids)
    return answers


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    end_ids: Collection[int],
    seed: int = 0,
) -> Iterator[str]:
    """The answer's text in pieces as they come; joined, they are the decoded answer."""
    random = torch.Generator().manual_seed(seed)
    answer: list[int] = []
    shown = ""
    with generating(model) as transformer:
        tokens, cache = torch.tensor([list(prompt)], device=transformer.device), None
        for _ in range(max_new_tokens):
            with torch.no_grad():
                output = transformer(
                    input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            token = _sample(output.logits[0, -1].float().cpu(), temperature, top_p, random)
            if token in end_ids:
                break
            answer.append(token)
            text = tokenizer.decode(answer, skip_special_tokens=True)
            if not text.endswith("�"):  # half of a character: wait for its other bytes
                yield text[len(shown) :]
                shown = text
            tokens, cache = torch.tensor([[token]], device=transformer.device), output.past_key_values
    yield tokenizer.decode(answer, skip_special_tokens=True)[len(shown) :]


@contextmanager
def generating(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers model as `unpacked` gives it, without its checkpoint's settings, which would leak into ours."""
    with unpacked(model) as transformer:
        defaults, transformer.generation_config = transformer.generation_config, GenerationConfig()
        try:
            yield transformer
        finally:
            transformer.generation_config = defaults


@contextmanager
def unpacked(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers model in eval mode, under padded attention and its precision; put back afterwards."""
    transformer = unwrapped(model)
    attention = transformer.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    transformer.set_attn_implementation(_ATTENTION)
    model.eval()  # dropout off; gradient checkpointing acts in training mode only
    try:
        with _autocast(transformer):
            yield transformer
    finally:
        for module in training:
            module.training = True
        transformer.set_attn_implementation(attention)


def _autocast(model: nn.Module) -> torch.autocast | nullcontext:
    """bf16 weights and fp32 ones meet only under autocast, as in training."""
    weight = next((weight for weight in model.parameters() if weight.dtype == torch.bfloat16), None)
    return torch.autocast(weight.device.type, torch.bfloat16) if weight is not None else nullcontext()


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _sampling(temperature: float, top_p: float) -> dict[str, float | int | bool]:
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def _sample(logits: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """One token; logits (vocabulary). The nucleus is the fewest tokens whose probabilities reach top_p."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(dim=-1).sort(descending=True)
    probabilities[probabilities.cumsum(dim=-1) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=random)])


def _left_padded(prompts: list[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask, each (batch, longest)."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _until_end(tokens: list[int], end_ids: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens))
    return tokens[:end]
