"""Merging an adapter into its base, and measuring on text how much the model's outputs change."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuner import config
from tuner.errors import UserError
from tuner.models.adapter_kinds import SCORE, has_score
from tuner.models.adapters import continue_adapter
from tuner.models.atomic_folder import new_folder
from tuner.models.device_errors import is_of_device
from tuner.models.folder_files import first_line
from tuner.models.generate import unpacked
from tuner.models.layout import Layout, in_layout
from tuner.models.load import Head, Loaded, Precision, load_base
from tuner.models.locate import Location, locate
from tuner.models.positions import Positions
from tuner.models.quantization import dequantize
from tuner.models.reward_record import read_reward_record, set_score_token, write_reward_record
from tuner.models.save import disk_errors, save_full, write_companions
from tuner.models.tokenizer import read_tokenizer
from tuner.models.vocabulary import grow_embeddings

MIN_TOKENS = 256
MAX_TOKENS = 1024
"""Tokens compared at most: 1024 rows of fp32 logits over InternLM2's vocabulary take 380 MB."""
MAX_MEAN_KL = 1e-3
"""Mean KL divergence in nats per token above which a merge is refused."""
MAX_SCORE_DIFFERENCE = 1e-3
"""Difference of scores above which a merge is refused; scores are a few units large."""
MIN_AGREEMENT = 0.99
"""Share of tokens with the same most likely next token below which a merge is refused."""


@dataclass(frozen=True)
class Difference:
    """Difference of two models' next-token distributions over the same tokens."""

    mean_kl: float
    """Mean of KL(before ‖ after), in nats per token."""

    agreement: float
    """Share of tokens with the same most likely next token."""

    @property
    def exceeded(self) -> str:
        """The limits that it exceeds, in words; "" for none."""
        limits = []
        if not self.mean_kl <= MAX_MEAN_KL:  # NaN exceeds it
            limits.append(f"the mean KL is above {MAX_MEAN_KL:g}")
        if not self.agreement >= MIN_AGREEMENT:
            limits.append(f"the most likely token is the same on less than {MIN_AGREEMENT:.0%}")
        return " and ".join(limits)

    def __str__(self) -> str:
        return f"mean KL {self.mean_kl:.2e} nats, same most likely token on {self.agreement:.2%}"


@dataclass(frozen=True)
class ScoreDifference:
    """Difference of two reward models' scores, read at every token of the same rows."""

    largest: float
    """Largest absolute difference."""

    standard_deviation: float
    """Standard deviation of the scores before."""

    @property
    def exceeded(self) -> str:
        """The limit that it exceeds, in words; "" for none."""
        return "" if self.largest <= MAX_SCORE_DIFFERENCE else f"that is above {MAX_SCORE_DIFFERENCE:g}"

    def __str__(self) -> str:
        return f"scores differ by at most {self.largest:.2e}, of a standard deviation of {self.standard_deviation:.3f}"


@dataclass(frozen=True)
class MergeReport:
    """How much a merge changed a model's outputs, over the same tokens, computed in fp32."""

    output: Path
    tokens: int

    folding: Difference | ScoreDifference
    """From the adapter on its base to the merged weights; a merge with a large one is refused."""

    rounding: Difference | ScoreDifference
    """From the adapter on its base to the merged weights, rounded to the file's precision."""

    activations: Difference | ScoreDifference | None
    """From LLM.int8(), which rounds activations, to the same weights without that; None for other bases."""


def merge(
    run_or_model_folder: str | Path,
    output: Path,
    *,
    dtype: Precision = "bf16",
    texts: Sequence[str],
    layout: Layout = "own",
    device: torch.device | None = None,
    trust: bool = False,
) -> MergeReport:
    """Merge a run's adapter into the dequantized base it was trained on; write a full model folder in a layout.

    The adapter on its (quantized) base and the merged model are compared in fp32 over the texts' first 256 to 1024
    tokens. LLM.int8() also rounds activations, which merged weights cannot reproduce: the comparison leaves that out,
    and the report has it apart. trust: let the base run Python code of its own. Needs memory for the base in fp32 on
    the device (by default the CPU). Raises UserError when there is no adapter, too little text, something at `output`,
    a mean KL above MAX_MEAN_KL, an agreement below MIN_AGREEMENT, or a score difference above MAX_SCORE_DIFFERENCE.
    """
    location = locate_adapter(run_or_model_folder, trust)
    check_output(output)
    tokenizer = read_tokenizer(location.tokenizer_folder, trust_remote_code=trust)
    base = _load_in_fp32(location, tokenizer, device or torch.device("cpu"), trust)
    rows = _token_rows(tokenizer, texts, Positions.of(base).limit or MAX_TOKENS)
    adapted = _adapt(base, location)
    before, activations = outputs(adapted, rows), None
    if location.reference.quantization == "int8":
        adapted = _adapt(_dequantized_base(adapted), location)
        # the folding is judged against this: LLM.int8()'s rounding of activations is no error of the merge
        with_rounding, before = before, outputs(adapted, rows)
        activations = _difference(with_rounding, before)
    merged = fold(adapted.unload(), location)
    folding = _difference(before, outputs(merged, rows))
    report = MergeReport(output, sum(map(len, rows)), folding, _difference(before, before), activations)
    _check(report.folding, run_or_model_folder)
    if dtype == "bf16":
        _round_to_bf16(merged)
        report = replace(report, rounding=_difference(before, outputs(merged, rows)))
    write_complete(Loaded(merged, tokenizer, location.reference, None, dtype), location, output, layout)
    return report


def export(
    run_or_model_folder: str | Path,
    output: Path,
    *,
    dtype: Precision = "bf16",
    layout: Layout = "own",
    device: torch.device | None = None,
    trust: bool = False,
) -> None:
    """Write a model without an adapter in another layout or precision. trust: let it run Python code of its own.

    Raises UserError when it has an adapter (`merge` does both), or there is something at `output`.
    """
    location = locate(config.Model(path=str(run_or_model_folder), trust_remote_code=trust))
    if location.adapter_folder is not None:
        raise UserError(f"{run_or_model_folder}: has an adapter, which must be merged")
    check_output(output)
    tokenizer = read_tokenizer(location.tokenizer_folder, trust_remote_code=trust)
    model = _load_in_fp32(location, tokenizer, device or torch.device("cpu"), trust)
    write_complete(Loaded(model, tokenizer, location.reference, None, dtype), location, output, layout)


def write_complete(loaded: Loaded, location: Location, output: Path, layout: Layout) -> None:
    """Write a model without adapters for other tools, with tokenizer, base record and reward record."""
    record = None
    if location.has_score:
        record = read_reward_record(loaded, location.folder)
        set_score_token(loaded, record.reward_token)
    # killed halfway, a folder with its name would look like a complete model
    with disk_errors(output), new_folder(output) as folder:
        save_full(in_layout(loaded.transformer, layout), folder, loaded.precision)
        write_companions(loaded, folder)
        if record is not None:
            write_reward_record(folder, record)


def check_output(output: Path) -> None:
    """Raises UserError when there is something at a path."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is not empty; name a new folder for the model")


def locate_adapter(run_or_model_folder: str | Path, trust: bool = False) -> Location:
    """Location of an adapter and its base; UserError when there is no adapter. trust: fetch the base's code, too."""
    location = locate(config.Model(path=str(run_or_model_folder), trust_remote_code=trust))
    if location.adapter_folder is None:
        raise UserError(f"{run_or_model_folder}: has no adapter to merge; use the folder as it is")
    return location


def fold(base: PreTrainedModel, location: Location) -> PreTrainedModel:
    """The base in fp32 layers with the adapter merged into them.

    A merge into 4-bit layers would quantize the sum again, with an error larger than what most adapters change.
    """
    dequantize(base)
    # before the merge: tied, the adapter of one would be folded into the other as well
    was_tied = _untie_head(base)
    adapted = _adapt(base, location)
    try:
        merged = adapted.merge_and_unload()
    except (RuntimeError, ValueError) as error:  # peft has variants that only exist beside their base
        if is_of_device(error):
            raise
        raise UserError(
            f"{location.adapter_folder}: its adapter cannot be merged ({first_line(error)}); use it on its base instead"
        ) from error
    _retie_head(merged, was_tied)
    return merged.requires_grad_(False)


@torch.no_grad()
def outputs(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """Logits at every token, [tokens of all rows, vocabulary], or a reward model's scores, [tokens, 1]; fp32."""
    outputs_of_rows = []
    with unpacked(model) as transformer:
        for row in rows:
            tokens = torch.tensor([row], device=transformer.device)
            if has_score(transformer):
                hidden_TD = transformer.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0]
                outputs_of_rows.append(transformer.get_submodule(SCORE)(hidden_TD.float()).cpu())
            else:
                outputs_of_rows.append(transformer(input_ids=tokens, use_cache=False).logits[0].cpu())
    return torch.cat(outputs_of_rows).float()


def _load_in_fp32(
    location: Location, tokenizer: PreTrainedTokenizerBase, device: torch.device, trust: bool
) -> PreTrainedModel:
    """The base as it was in training, perhaps rounded to bf16, or a complete model as in its file; it computes in
    fp32."""
    held_in = torch.float32 if location.precision == "fp32" else torch.bfloat16
    head: Head = "score" if location.has_score else "language"
    model = load_base(
        location, held_in, compute_dtype=torch.float32, device=device, trust_remote_code=trust, head=head
    )
    grow_embeddings(model, location.reference.embedding_rows, tokenizer)
    for weight in model.parameters():
        # after loading: read in fp32, the weights would not be those the adapter was trained on
        if weight.dtype == torch.bfloat16:
            weight.data = weight.data.float()
    return model


def _dequantized_base(adapted: Any) -> PreTrainedModel:
    base = adapted.unload()
    dequantize(base)
    return base


def _adapt(model: PreTrainedModel, location: Location) -> Any:
    """peft's wrapper around the model, with the saved adapter."""
    folder = location.adapter_folder
    assert folder is not None
    return continue_adapter(model, folder, requested=None, saved=location.adapter, trained=False)


def _untie_head(model: PreTrainedModel) -> bool:
    """Untie the head from the embedding: what is merged into one must not change the other. Whether it was tied."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    tied = head.weight is model.get_input_embeddings().weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return tied


def _retie_head(model: PreTrainedModel, was_tied: bool) -> None:
    """Tie head and embedding again where they are still equal; else both are written."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return
    model.config.tie_word_embeddings = was_tied and torch.equal(
        head.get_parameter("weight"), embedding.get_parameter("weight")
    )
    if model.config.tie_word_embeddings:
        head.weight = embedding.weight
    else:
        # else transformers drops the head from the file as a copy of the embedding
        model.all_tied_weights_keys = {}


def _round_to_bf16(model: nn.Module) -> None:
    for weight in model.parameters():
        # back in fp32, so that the difference measured is of the weights and not of bf16 products
        weight.data = weight.data.bfloat16().float()


def _token_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int) -> list[list[int]]:
    """The texts' first tokens, in rows of at most `longest`."""
    rows, room = [], MAX_TOKENS
    for text in texts:
        if room == 0:
            break
        row = tokenizer(text)["input_ids"][:room]
        rows += [row[start : start + longest] for start in range(0, len(row), longest)]
        room -= len(row)
    if MAX_TOKENS - room < MIN_TOKENS:
        raise UserError(f"merge: {MAX_TOKENS - room} tokens of text to compare on; give {MIN_TOKENS} or more")
    return rows


def _difference(before: Tensor, after: Tensor) -> Difference | ScoreDifference:
    """Difference of two models' outputs; that of logits row by row in fp64, as the KL's terms nearly cancel."""
    if before.shape[1] == 1:
        return ScoreDifference(float((before - after).abs().max()), float(before.std()))
    divergences = []
    for row_before, row_after in zip(before, after, strict=True):
        old, new = row_before.double().log_softmax(dim=-1), row_after.double().log_softmax(dim=-1)
        divergences.append((old.exp() * (old - new)).sum())
    same = before.argmax(dim=-1) == after.argmax(dim=-1)
    return Difference(float(torch.stack(divergences).mean()), float(same.double().mean()))


def _check(folding: Difference | ScoreDifference, folder: str | Path) -> None:
    if folding.exceeded:
        raise UserError(
            f"{folder}: merging changes the model too much ({folding}: {folding.exceeded}), so nothing was written; "
            "use the adapter on its base instead"
        )
