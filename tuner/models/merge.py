"""Folding an adapter into its base, and proving on text that nothing was lost."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuner import config
from tuner.errors import UserError
from tuner.models.adapters import continue_adapter
from tuner.models.generate import generating
from tuner.models.load import Precision, load_base
from tuner.models.locate import Location, locate
from tuner.models.quantization import dequantise
from tuner.models.reference import write_record
from tuner.models.save import disk_errors, save_full
from tuner.models.tokenizer import read_tokenizer, save_tokenizer

MIN_TOKENS = 256
MAX_TOKENS = 1024
"""Real tokens compared: 1024 rows of fp32 logits over InternLM2's vocabulary are 380 MB."""
MAX_MEAN_KL = 1e-3
"""Nats per token above which a merge is refused."""
MIN_AGREEMENT = 0.99
"""Share of tokens with the same most likely successor under which a merge is refused."""


@dataclass(frozen=True)
class Difference:
    """How far two models' next-token distributions are apart, over the same tokens."""

    mean_kl: float
    """Mean of KL(before ‖ after), in nats per token."""

    agreement: float
    """Share of tokens whose most likely successor is the same."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge changed, each figure over the same tokens and in fp32 products."""

    output: Path
    tokens: int

    folding: Difference
    """From the adapter on its base to the merged weights: what the merge is refused for."""

    rounding: Difference
    """From the adapter on its base to the merged weights rounded to the file's precision."""

    activations: Difference | None
    """From LLM.int8(), which rounds activations, to the same weights without; None for other bases."""


def merge(
    run_or_model_folder: str | Path,
    output: Path,
    *,
    dtype: Precision = "bf16",
    texts: Sequence[str],
    device: torch.device | None = None,
) -> MergeReport:
    """Fold a run's adapter into the de-quantised base it was trained on; write a full model folder.

    The adapter on its (quantised) base and the merged model are compared in fp32 over the texts' first 256
    to 1024 tokens; an 8-bit base without its rounding of activations, which no weights can hold: that
    is reported apart. Needs the base in fp32 in the device's memory (the CPU's by default). Raises UserError
    when there is no adapter, too little text, something at `output`, or the two differ by more than
    MAX_MEAN_KL or agree on less than MIN_AGREEMENT.
    """
    location = locate_adapter(run_or_model_folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is not empty; name a new folder for the merged model")
    tokenizer = read_tokenizer(location.tokenizer_folder)
    rows = _token_rows(tokenizer, texts)
    adapted = _adapt(_load_in_fp32(location, device or torch.device("cpu")), location)
    before, activations = next_token_logits(adapted, rows), None
    if location.reference.quantization == "int8":
        adapted = _adapt(_dequantised(adapted), location)
        rounded, before = before, next_token_logits(adapted, rows)
        activations = _compare(rounded, before)
    merged = fold(adapted.unload(), location)
    report = MergeReport(
        output=output,
        tokens=sum(len(row) for row in rows),
        folding=_compare(before, next_token_logits(merged, rows)),
        rounding=Difference(0.0, 1.0),
        activations=activations,
    )
    _check(report.folding, run_or_model_folder)
    if dtype == "bf16":
        _round_to_bf16(merged)
        report = replace(report, rounding=_compare(before, next_token_logits(merged, rows)))
    try:
        with disk_errors(output):
            save_full(merged, output, dtype)
            save_tokenizer(tokenizer, output)
            write_record(output, location.reference, None)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # half a model looks like one
        raise
    return report


def locate_adapter(run_or_model_folder: str | Path) -> Location:
    """Where an adapter and its base lie; UserError when there is no adapter."""
    location = locate(config.Model(path=str(run_or_model_folder)))
    if location.adapter_folder is None:
        raise UserError(f"{run_or_model_folder}: has no adapter to merge; use the folder as it is")
    return location


def fold(base: PreTrainedModel, location: Location) -> PreTrainedModel:
    """The base in plain fp32 layers with the adapter added into them. Never into 4-bit ones: those would be
    quantised anew, which costs more than most adapters change."""
    dequantise(base)
    was_tied = _separate_head(base)
    merged = _adapt(base, location).merge_and_unload()
    _settle_head(merged, was_tied)
    return merged.requires_grad_(False)


@torch.no_grad()
def next_token_logits(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """(tokens of all rows, vocabulary), fp32 on the CPU."""
    with generating(model) as transformer:
        inputs = (torch.tensor([row], device=transformer.device) for row in rows)
        logits = [transformer(input_ids=tokens, use_cache=False).logits[0].cpu() for tokens in inputs]
    return torch.cat(logits).float()


def _load_in_fp32(location: Location, device: torch.device) -> PreTrainedModel:
    """The base with the weights it had in training, where they may be rounded to bf16, computing in fp32."""
    held_in = torch.float32 if location.reference.precision == "fp32" else torch.bfloat16
    model = load_base(location, held_in, compute_dtype=torch.float32, device=device)
    for weight in model.parameters():
        if weight.dtype == torch.bfloat16:
            weight.data = weight.data.float()
    return model


def _dequantised(adapted: nn.Module) -> PreTrainedModel:
    base = adapted.unload()
    dequantise(base)
    return base


def _adapt(model: PreTrainedModel, location: Location) -> nn.Module:
    folder = location.adapter_folder
    assert folder is not None
    return continue_adapter(model, folder, asked=None, saved=location.lora, trained=False)


def _separate_head(model: PreTrainedModel) -> bool:
    """Give a tied head weights of its own: what is added to it must not be added to the embedding too."""
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return tied


def _settle_head(model: PreTrainedModel, was_tied: bool) -> None:
    """Tie head and embedding again where they are still equal; else both are to be written."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = was_tied and torch.equal(head.weight, embedding.weight)
    if model.config.tie_word_embeddings:
        head.weight = embedding.weight
    else:
        model.all_tied_weights_keys = {}


def _round_to_bf16(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()


def _token_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    rows, left = [], MAX_TOKENS
    for text in texts:
        if left == 0:
            break
        row = tokenizer(text, truncation=True, max_length=left)["input_ids"]
        rows += [row] if row else []
        left -= len(row)
    if MAX_TOKENS - left < MIN_TOKENS:
        raise UserError(f"merge: {MAX_TOKENS - left} tokens of text to compare on; give {MIN_TOKENS} or more")
    return rows


def _compare(before: Tensor, after: Tensor) -> Difference:
    """Of two models' logits, row by row in fp64: the sums cancel to next to nothing."""
    divergences = []
    for old, new in zip(before, after, strict=True):
        old, new = old.double().log_softmax(dim=-1), new.double().log_softmax(dim=-1)
        divergences.append((old.exp() * (old - new)).sum())
    same = before.argmax(dim=-1) == after.argmax(dim=-1)
    return Difference(float(torch.stack(divergences).mean()), float(same.double().mean()))


def _check(folding: Difference, folder: str | Path) -> None:
    # written so that NaN fails
    if not (folding.mean_kl <= MAX_MEAN_KL and folding.agreement >= MIN_AGREEMENT):
        raise UserError(
            f"{folder}: merging changes the model (mean KL {folding.mean_kl:.2g} nats, same most likely "
            f"token on {folding.agreement:.1%}; allowed are {MAX_MEAN_KL:g} and {MIN_AGREEMENT:.0%}), so "
            "nothing was written; use the adapter on its base instead"
        )
