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
from tuner.models.adapters import continue_adapter, has_score
from tuner.models.base_record import write_record
from tuner.models.generate import unpacked
from tuner.models.layout import Layout, in_layout
from tuner.models.load import Head, Loaded, Precision, load_base
from tuner.models.locate import Location, locate
from tuner.models.quantization import dequantise
from tuner.models.reward_record import read_reward_record, tell_others, write_reward_record
from tuner.models.save import disk_errors, save_full
from tuner.models.tokenizer import read_tokenizer, save_tokenizer

MIN_TOKENS = 256
MAX_TOKENS = 1024
"""Real tokens compared: 1024 rows of fp32 logits over InternLM2's vocabulary are 380 MB."""
MAX_MEAN_KL = 1e-3
"""Nats per token above which a merge is refused."""
MAX_SCORE_DIFFERENCE = 1e-3
"""Difference of scores, which are a few units large, above which a merge is refused."""
MIN_AGREEMENT = 0.99
"""Share of tokens with the same most likely successor under which a merge is refused."""


@dataclass(frozen=True)
class Difference:
    """How far two models' next-token distributions are apart, over the same tokens."""

    mean_kl: float
    """Mean of KL(before ‖ after), in nats per token."""

    agreement: float
    """Share of tokens whose most likely successor is the same."""

    @property
    def is_small(self) -> bool:
        return self.mean_kl <= MAX_MEAN_KL and self.agreement >= MIN_AGREEMENT  # written so that NaN fails

    def __str__(self) -> str:
        return f"mean KL {self.mean_kl:.2e} nats, same likeliest token on {self.agreement:.2%}"


@dataclass(frozen=True)
class ScoreDifference:
    """How far two reward models' scores are apart, read at every token of the same rows."""

    largest: float
    """Of the absolute differences."""

    spread: float
    """Standard deviation of the scores themselves."""

    @property
    def is_small(self) -> bool:
        return self.largest <= MAX_SCORE_DIFFERENCE

    def __str__(self) -> str:
        return f"scores differ by {self.largest:.2e} at most, of a spread of {self.spread:.3f}"


@dataclass(frozen=True)
class MergeReport:
    """What a merge changed, each figure over the same tokens and in fp32 products."""

    output: Path
    tokens: int

    folding: Difference | ScoreDifference
    """From the adapter on its base to the merged weights: what the merge is refused for."""

    rounding: Difference | ScoreDifference
    """From the adapter on its base to the merged weights rounded to the file's precision."""

    activations: Difference | ScoreDifference | None
    """From LLM.int8(), which rounds activations, to the same weights without; None for other bases."""


def merge(
    run_or_model_folder: str | Path,
    output: Path,
    *,
    dtype: Precision = "bf16",
    texts: Sequence[str],
    layout: Layout = "own",
    device: torch.device | None = None,
) -> MergeReport:
    """Fold a run's adapter into the de-quantised base it was trained on; write a full model folder in a layout.

    The adapter on its (quantised) base and the merged model are compared in fp32 over the texts' first 256
    to 1024 tokens; an 8-bit base without its rounding of activations, which no weights can hold: that
    is reported apart. Needs the base in fp32 in the device's memory (the CPU's by default). Raises UserError
    when there is no adapter, too little text, something at `output`, or the two differ by more than
    MAX_MEAN_KL, agree on less than MIN_AGREEMENT, or score by more than MAX_SCORE_DIFFERENCE apart.
    """
    location = locate_adapter(run_or_model_folder)
    check_output(output)
    tokenizer = read_tokenizer(location.tokenizer_folder)
    rows = _token_rows(tokenizer, texts)
    adapted = _adapt(_load_in_fp32(location, device or torch.device("cpu")), location)
    before, activations = outputs(adapted, rows), None
    if location.reference.quantization == "int8":
        adapted = _adapt(_dequantised(adapted), location)
        rounded, before = before, outputs(adapted, rows)
        activations = _compare(rounded, before)
    merged = fold(adapted.unload(), location)
    folding = _compare(before, outputs(merged, rows))
    report = MergeReport(output, sum(map(len, rows)), folding, _compare(before, before), activations)
    _check(report.folding, run_or_model_folder)
    if dtype == "bf16":
        _round_to_bf16(merged)
        report = replace(report, rounding=_compare(before, outputs(merged, rows)))
    write_complete(Loaded(merged, tokenizer, location.reference, None, dtype), location, output, layout)
    return report


def export(
    run_or_model_folder: str | Path,
    output: Path,
    *,
    dtype: Precision = "bf16",
    layout: Layout = "own",
    device: torch.device | None = None,
) -> None:
    """Write a model without an adapter in another layout or precision.

    Raises UserError when it has an adapter (`merge` does both), or there is something at `output`.
    """
    location = locate(config.Model(path=str(run_or_model_folder)))
    if location.adapter_folder is not None:
        raise UserError(f"{run_or_model_folder}: has an adapter, which must be merged")
    check_output(output)
    model = _load_in_fp32(location, device or torch.device("cpu"))
    tokenizer = read_tokenizer(location.tokenizer_folder)
    write_complete(Loaded(model, tokenizer, location.reference, None, dtype), location, output, layout)


def write_complete(loaded: Loaded, location: Location, output: Path, layout: Layout) -> None:
    """Write a model without adapters that other tools load, with what the folder it comes from says of it."""
    record = None
    if location.has_score:
        record = read_reward_record(loaded, location.folder)
        tell_others(loaded, record.reward_token)
    try:
        with disk_errors(output):
            save_full(in_layout(loaded.transformer, layout), output, loaded.precision)
            save_tokenizer(loaded.tokenizer, output)
            write_record(output, loaded.base, None)
            if record is not None:
                write_reward_record(output, record)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # half a model looks like one
        raise


def check_output(output: Path) -> None:
    """Raises UserError when there is something at a path."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is not empty; name a new folder for the model")


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
def outputs(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """Logits of every token, (tokens of all rows, vocabulary), or a reward model's scores, (tokens, 1); fp32, CPU."""
    found = []
    with unpacked(model) as transformer:
        for row in rows:
            tokens = torch.tensor([row], device=transformer.device)
            if has_score(transformer):
                hidden_TD = transformer.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0]
                found.append(transformer.score(hidden_TD.float()).cpu())
            else:
                found.append(transformer(input_ids=tokens, use_cache=False).logits[0].cpu())
    return torch.cat(found).float()


def _load_in_fp32(location: Location, device: torch.device) -> PreTrainedModel:
    """The base with the weights it had in training, where they may be rounded to bf16, or those of a complete
    model's file; computing in fp32."""
    held_in = torch.float32 if location.precision == "fp32" else torch.bfloat16
    head: Head = "score" if location.has_score else "language"
    model = load_base(location, held_in, compute_dtype=torch.float32, device=device, head=head)
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
    return continue_adapter(model, folder, requested=None, saved=location.adapter, trained=False)


def _separate_head(model: PreTrainedModel) -> bool:
    """Give a tied head weights of its own: what is added to it must not be added to the embedding too."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    tied = head.weight is model.get_input_embeddings().weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return tied


def _settle_head(model: PreTrainedModel, was_tied: bool) -> None:
    """Tie head and embedding again where they are still equal; else both are to be written."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return
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


def _compare(before: Tensor, after: Tensor) -> Difference | ScoreDifference:
    """Of two models' outputs; logits row by row in fp64, where the sums cancel to next to nothing."""
    if before.shape[1] == 1:
        return ScoreDifference(float((before - after).abs().max()), float(before.std()))
    divergences = []
    for old, new in zip(before, after, strict=True):
        old, new = old.double().log_softmax(dim=-1), new.double().log_softmax(dim=-1)
        divergences.append((old.exp() * (old - new)).sum())
    same = before.argmax(dim=-1) == after.argmax(dim=-1)
    return Difference(float(torch.stack(divergences).mean()), float(same.double().mean()))


def _check(folding: Difference | ScoreDifference, folder: str | Path) -> None:
    if not folding.is_small:
        raise UserError(
            f"{folder}: merging changes the model too much ({folding}), so nothing was written; "
            "use the adapter on its base instead"
        )
