"""The peft door: adapters beside frozen layers, in fp32, fresh or continued."""

import copy
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuner import config
from tuner.errors import UserError
from tuner.models.locate import first_line
from tuner.models.quantization import bitsandbytes

ADAPTER = "default"
SCORE = "score"
"""Name of the scalar head in transformers' sequence classification models."""
SCORES = "SEQ_CLS"
"""peft's name for what such models do: its folder then holds the head too."""
_MERGE_FIRST = (
    "leave the adapter out to continue it, or `tuner merge` the run first and train from the merged folder"
)


def add_adapter(model: PreTrainedModel, lora: config.LoRA, seed: int) -> nn.Module:
    """Put fresh LoRA adapters beside the model's linear layers; everything else is frozen, but for a scalar head.

    A is Kaiming-uniform from `seed`, B is zero: the model starts as it was (Hu et al., 2021). Returns
    peft's wrapper. Raises UserError when a target or a module of `train_whole` is not in the model.
    """
    peft = _peft()
    targets = _targets(model, lora)
    _check_names(model, lora.train_whole, "adapter.train_whole")
    settings = peft.LoraConfig(
        task_type=SCORES if has_score(model) else "CAUSAL_LM",
        r=lora.r,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=[*lora.train_whole, *_score_of(model)] or None,
        bias="none",
    )
    with torch.random.fork_rng(devices=_devices(model)), _without_deprecations():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, settings, adapter_name=ADAPTER)
    _train_in_fp32(wrapped)
    return wrapped


def continue_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    asked: config.LoRA | None,
    saved: config.LoRA | None,
    trained: bool,
) -> nn.Module:
    """Load the adapter of a PEFT folder onto its base, to go on training it where `trained`.

    asked: what the config's adapter says; its rank, alpha and targets must be the saved ones, its dropout is
    taken. saved: the settings tuner wrote beside the adapter, if it did. A language model's adapter may go on as
    a reward model's, with the model's own scalar head. Raises UserError on other values, and on missing or
    unexpected weights.
    """
    peft = _peft()
    settings = peft.PeftConfig.from_pretrained(str(folder))
    if not isinstance(settings, peft.LoraConfig):
        raise UserError(
            f"{folder}: a {settings.peft_type} adapter; only LoRA adapters can be continued or merged"
        )
    if asked is not None:
        _check_same(asked, saved, settings, folder)
        settings.lora_dropout = asked.dropout
    settings.inference_mode = not trained
    settings.base_model_name_or_path = None  # or peft warns that the base was called otherwise
    without_score = has_score(model) and settings.task_type != SCORES
    if without_score:
        _take_on_score(settings, folder)
    file = Path(folder, "adapter_model.safetensors")
    try:
        weights = load_file(str(file))
        if without_score:
            weights[f"base_model.model.{SCORE}.weight"] = model.score.weight.detach()
        with _without_deprecations():
            wrapped = peft.get_peft_model(model, settings, adapter_name=ADAPTER)
            _check_keys(peft, wrapped, set(weights), file)
            peft.set_peft_model_state_dict(wrapped, weights, adapter_name=ADAPTER)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: its adapter does not fit the base model or cannot be read "
            f"({first_line(error)}); restore it or train again"
        ) from error
    if trained:
        _train_in_fp32(wrapped)
    return wrapped


def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Put a copy of one of the model's adapters beside it, with what it trains whole."""
    _add_beside(model, target, model.peft_config[source])
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for name, weight in weights.items():
            if _is_of(name, target):
                weight.data = weights[_renamed(name, target, source)].detach().clone()


def load_beside(model: nn.Module, folder: Path, name: str) -> Tensor:
    """Put the adapter of a reward model's PEFT folder beside those of a language model, as `name`.

    Returns its scalar head's weight, [1, D]. Raises UserError where it does not fit.
    """
    peft = _peft()
    settings = peft.PeftConfig.from_pretrained(str(folder))
    settings.modules_to_save = [one for one in settings.modules_to_save or () if one != SCORE] or None
    file = Path(folder, "adapter_model.safetensors")
    try:
        weights = load_file(str(file))
        head = weights.pop(f"base_model.model.{SCORE}.weight")
        _add_beside(model, name, settings)
        _check_keys(peft, model, set(weights), file, name)
        _hold_in_fp32(weight for key, weight in model.named_parameters() if _is_of(key, name))
        with _without_deprecations():
            peft.set_peft_model_state_dict(model, weights, adapter_name=name)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{folder}: its adapter does not fit the base model or cannot be read "
            f"({first_line(error)}); restore it or train again"
        ) from error
    return head


def train_only(model: nn.Module, *adapters: str) -> None:
    """Train the weights of these adapters and no others, in fp32; who is active changes nothing of it."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(_is_of(name, adapter) for adapter in adapters))
    _train_in_fp32(model)


def activate(model: nn.Module, adapter: str | None) -> None:
    """Have the model compute with one of its adapters, or with none. What is trained stays as it was.

    peft's own set_adapter makes the active adapter the trained one, and freezes all others.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    places = vars(model).get("_tuner_places")
    if places is None:  # walking all modules costs a small model more than it computes
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        places = [module for module in model.modules() if isinstance(module, kinds)]
        vars(model)["_tuner_places"] = places
    for place in places:
        known = adapter is not None and (
            isinstance(place, BaseTunerLayer) or adapter in place.modules_to_save
        )
        place._active_adapter = [adapter] if known else []


def belongs_to(parameter: str, adapter: str | None) -> bool:
    """Whether a weight of this name is an adapter's; every weight that is no adapter's belongs to all."""
    owner = _OWNER.search(parameter)
    return owner is None or owner[2] == adapter


def has_score(model: nn.Module) -> bool:
    """Whether a model without peft's wrapper ends in a scalar head, as reward models do, and not in logits."""
    return isinstance(getattr(model, SCORE, None), nn.Module)


def is_adapted(model: nn.Module) -> bool:
    """Whether adapters lie around the model; costs no peft where there are none."""
    return type(model).__module__.startswith("peft.")


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write a standard PEFT folder: adapter_model.safetensors in fp32, adapter_config.json naming `base`."""
    model.peft_config[ADAPTER].base_model_name_or_path = base
    # Embeddings are in it when they were trained whole, never because peft guesses that they were resized.
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)
    Path(folder, "README.md").unlink(missing_ok=True)  # peft's model card, a form nobody has filled in
    file = Path(folder, "adapter_config.json")
    values = json.loads(file.read_text(encoding="utf-8"))
    values["target_modules"] = sorted(
        values["target_modules"]
    )  # a set in peft: sorted, the file is reproducible
    if values["modules_to_save"]:  # peft adds its names for heads again whenever it loads
        values["modules_to_save"] = list(dict.fromkeys(values["modules_to_save"]))
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_OWNER = re.compile(r"\.(lora_\w+|modules_to_save)\.(\w+)(?=\.|$)")
"""In a weight's name, what kind of adapter's it is, and whose."""


def _is_of(parameter: str, adapter: str) -> bool:
    owner = _OWNER.search(parameter)
    return owner is not None and owner[2] == adapter


def _renamed(parameter: str, target: str, source: str) -> str:
    return _OWNER.sub(lambda found: f".{found[1]}.{source}", parameter)


def _add_beside(model: nn.Module, name: str, settings: Any) -> None:
    settings = copy.deepcopy(settings)
    settings.base_model_name_or_path = None
    with torch.random.fork_rng(devices=_devices(model)), _without_deprecations():
        # not PeftModelFor...'s own, which would add a head for sequence classification by every name it knows
        _peft().PeftModel.add_adapter(model, name, settings)


def _peft() -> Any:
    bitsandbytes()  # peft imports it, with the advice this door leaves out
    import peft

    return peft


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """peft 0.21 reads a name that transformers 5.23 deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _targets(model: PreTrainedModel, lora: config.LoRA) -> list[str]:
    """Name endings of the layers that get an adapter."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if lora.targets == "all-linear":
        head = model.get_output_embeddings()
        whole = {name for name, _ in _named(model, (*lora.train_whole, *_score_of(model)))}
        return sorted(
            {
                name.rpartition(".")[2]
                for name in linear
                if model.get_submodule(name) is not head and name not in whole
            }
        )
    _check_names(model, lora.targets, "adapter.targets")
    return list(lora.targets)


def _check_names(model: nn.Module, names: tuple[str, ...], where: str) -> None:
    for wanted in names:
        if not any(True for _ in _named(model, (wanted,))):
            layers = {
                name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")
            }
            raise UserError(
                f"{where}: no module of the model is named {wanted!r}; it has {', '.join(sorted(layers))}"
            )


def _named(model: nn.Module, endings: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(name == ending or name.endswith(f".{ending}") for ending in endings):
            yield name, module


def _score_of(model: nn.Module) -> tuple[str, ...]:
    return (SCORE,) if has_score(model) else ()


def _take_on_score(settings: Any, folder: Path) -> None:
    """Make a language model's adapter one of a reward model, whose head is trained whole."""
    whole = list(settings.modules_to_save or ())
    if "lm_head" in {*whole, *settings.target_modules}:
        raise UserError(
            f"{folder}: its adapter comes with a language head of its own, which a reward model has no place for; "
            "`tuner merge` the run first and train from the merged folder"
        )
    settings.task_type, settings.modules_to_save = SCORES, [*whole, SCORE]


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({weight.device for weight in model.parameters() if weight.device.type == "cuda"}, key=str)


def _train_in_fp32(model: nn.Module) -> None:
    _hold_in_fp32(weight for weight in model.parameters() if weight.requires_grad)


def _hold_in_fp32(weights: Iterable[nn.Parameter]) -> None:
    for weight in weights:
        weight.data = weight.data.float()


def _check_same(asked: config.LoRA, saved: config.LoRA | None, settings: Any, folder: Path) -> None:
    pairs = {"r": (asked.r, settings.r), "alpha": (float(asked.alpha), float(settings.lora_alpha))}
    if saved is not None:
        pairs["targets"] = (asked.targets, saved.targets)
        pairs["train_whole"] = (asked.train_whole, saved.train_whole)
    for name, (wanted, had) in pairs.items():
        if wanted != had:
            raise UserError(f"adapter.{name}={wanted!r}: the adapter in {folder} has {had!r}; {_MERGE_FIRST}")


def _check_keys(peft: Any, wrapped: nn.Module, found: set[str], file: Path, adapter: str = ADAPTER) -> None:
    """Every weight must be there: peft leaves a missing one at its random start with a mere warning."""
    state = peft.get_peft_model_state_dict(wrapped, adapter_name=adapter, save_embedding_layers=False)
    for kind, names in (("missing", set(state) - found), ("unexpected", found - set(state))):
        if names:
            raise UserError(
                f"{file}: {len(names)} {kind} weights, such as {', '.join(sorted(names)[:3])}; "
                "it belongs to another model or is damaged: restore it or train again"
            )
