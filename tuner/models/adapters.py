"""Adapters beside frozen layers, in fp32: fresh, continued, or several on one base, of which one is active.

peft is imported here and in `adapter_kinds.py` alone.
"""

import copy
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuner import config
from tuner.errors import UserError
from tuner.models.adapter_file import FILE as ADAPTER_FILE
from tuner.models.adapter_file import check_settings, read_adapter_file
from tuner.models.adapter_kinds import (
    KINDS,
    SCORE,
    SEQUENCE_CLASSIFICATION,
    add_score_to,
    has_score,
    kind_of,
    modules_named,
    peft_config,
    peft_library,
)
from tuner.models.device_errors import is_of_device
from tuner.models.folder_files import first_line
from tuner.models.slices import hold_whole
from tuner.models.unwrap import unwrapped

ADAPTER = "default"
"""Name of a model's first adapter, peft's default."""
_MERGE_FIRST = (
    "leave the adapter out to continue it, or `tuner merge` the run first and train from the merged folder"
)


def add_adapter(
    model: PreTrainedModel, adapter: config.Adapter, seed: int, new_tokens: range = range(0)
) -> nn.Module:
    """Wrap a model in a fresh adapter, initialized from `seed`; everything else is frozen, except a scalar head.

    new_tokens: tokens whose rows of the embedding and the language head are trained and saved with the adapter. The
    model's outputs do not change. Returns peft's wrapper. Raises UserError when a target or a module of `train_whole`
    is not in the model.
    """
    settings = peft_config(adapter, model)
    if new_tokens:
        settings.trainable_token_indices = _token_rows(model, new_tokens, settings.modules_to_save or ())
    _hold_copied_whole(model, settings)
    # forked: seeding here must not reset the global generators, from which dropout draws in training
    with torch.random.fork_rng(devices=_devices(model)), _without_deprecations():
        torch.manual_seed(seed)
        try:
            wrapped = peft_library().get_peft_model(model, settings, adapter_name=ADAPTER)
        except (
            ValueError,
            TypeError,
            NotImplementedError,
        ) as error:  # about a target that is no kind of layer it knows
            raise UserError(f"adapter: peft cannot put it on this model ({first_line(error)})") from error
    _train_in_fp32(wrapped)
    return wrapped


def _token_rows(model: PreTrainedModel, tokens: range, whole: Iterable[str]) -> dict[str, list[int]] | None:
    """peft's setting by which single rows of the embedding and the head are trained; those of a tied head are the
    embedding's. whole: modules that are trained whole."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight  # type: ignore[union-attr]
    layers = [embedding] if head is None or tied else [embedding, head]
    names = (name.rpartition(".")[2] for name, module in model.named_modules() if module in layers)
    return {name: list(tokens) for name in names if name not in whole} or None


def continue_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    requested: config.Adapter | None,
    saved: config.Adapter | None,
    trained: bool,
) -> nn.Module:
    """Load the adapter of a PEFT folder onto its base, to continue its training where `trained`.

    requested: the config's adapter; its dropout is used, its other values must be those of the saved adapter.
    saved: the settings tuner wrote beside the adapter, if it did. A language model's adapter may be continued as a
    reward model's, with the model's own scalar head. On the meta device no weights are read. Raises UserError on
    other values, and on missing or unexpected weights.
    """
    settings = _read_settings(folder)
    kind = kind_of(settings, folder)
    if requested is not None:
        _check_same(requested, saved, settings, folder)
        kind.take_dropout(settings, requested)
    # every folder that peft saves says inference_mode=true, which would freeze the adapter
    settings.inference_mode = not trained
    settings.base_model_name_or_path = None  # or peft warns when the base had another name
    new_head = has_score(model) and settings.task_type != SEQUENCE_CLASSIFICATION
    if new_head:
        add_score_to(settings, folder)
    file = Path(folder, "adapter_model.safetensors")
    with _adapter_errors(folder):
        weights = _read_weights(model, file)
        _hold_copied_whole(model, settings)
        if weights is not None and new_head:
            # the file has no head: without this entry _check_keys would report it missing
            weights[_SAVED_HEAD] = model.get_parameter(f"{SCORE}.weight").detach()
        with _without_deprecations():
            wrapped = peft_library().get_peft_model(model, settings, adapter_name=ADAPTER)
            _set_weights(wrapped, weights, file, ADAPTER)
    if trained:
        _train_in_fp32(wrapped)
    return wrapped


def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Put a copy of one of the model's adapters beside it, with the modules it trains whole."""
    _add_beside(model, target, _settings(model)[source])
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for name, weight in weights.items():
            if is_of(name, target):
                # by .data and not copy_: peft copies a module trained whole from the base, in bf16, and a
                # reference rounded to that would not be the policy it was copied from
                weight.data = weights[_renamed(name, target, source)].detach().clone()


def load_beside(model: nn.Module, folder: Path, name: str) -> None:
    """Put the adapter of a PEFT folder beside those of a language model on the same base, as `name`.

    On the meta device no weights are read. Raises UserError where the adapter does not fit.
    """
    settings, file = _read_settings(folder), Path(folder, "adapter_model.safetensors")
    with _adapter_errors(folder):
        _put_beside(model, name, settings, _read_weights(model, file), file)


def load_reward_beside(model: nn.Module, folder: Path, name: str) -> Tensor:
    """The same for a reward model's adapter. Returns the weight of its scalar head, [1, D]."""
    settings = _read_settings(folder)
    # a language model has no module `score`: the head goes to the role's own ScalarHead instead
    settings.modules_to_save = [
        module for module in settings.modules_to_save or () if module != SCORE
    ] or None
    file = Path(folder, "adapter_model.safetensors")
    with _adapter_errors(folder):
        weights = _read_weights(model, file)
        head = _meta_head(model) if weights is None else weights.pop(_SAVED_HEAD)
        _put_beside(model, name, settings, weights, file)
    return head


def train_only(model: nn.Module, *adapters: str) -> None:
    """Make the weights of these adapters the only trained ones, in fp32, whichever adapter is active."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(is_of(name, adapter) for adapter in adapters))
    _train_in_fp32(model)


def activate(model: nn.Module, adapter: str | None) -> None:
    """Make the model compute with one of its adapters, or with none; the trained weights stay the same.

    peft's own set_adapter also makes the active adapter trained and freezes all others: activating the reference for
    a pass would freeze the policy.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in _adapted_layers(model):
        if adapter is not None and (isinstance(layer, BaseTunerLayer) or adapter in layer._adapters):
            layer._active_adapter = [adapter]
        else:
            # empty, and no name that a module trained whole lacks: only then does its wrapper look
            # attributes such as `weight` up in the base's module
            layer._active_adapter = []


def _adapted_layers(model: nn.Module) -> list[Any]:
    """peft's wrappers of layers and of modules trained whole, listed once per model."""
    layers = vars(model).get("_tuner_layers")
    if layers is None:  # walking all modules takes longer than a small model's forward pass
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        layers = vars(model)["_tuner_layers"] = [
            module for module in model.modules() if isinstance(module, wrappers)
        ]
    return layers


def adapted_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """The base's weights that an adapter is added to, or stands in the place of."""
    from peft.tuners.lora.layer import ParamWrapper

    for layer in _adapted_layers(model):
        if isinstance(layer, ParamWrapper):
            yield layer.get_param()
        elif hasattr(layer, "lora_A"):
            yield layer.get_base_layer().weight
        elif getattr(layer, "modules_to_save", None):
            yield from layer.original_module.parameters()


def belongs_to(parameter: str, adapter: str | None) -> bool:
    """Whether an adapter's computation uses the weight of this name: its own weights, and those of no adapter."""
    owner = _OWNER.search(parameter)
    return owner is None or owner[2] == adapter


def trains_rows_of_head(model: nn.Module) -> bool:
    """Whether an adapter trains single rows of the language head: its outputs are not those of its plain matrix."""
    head = unwrapped(model).get_output_embeddings()
    return head is not None and hasattr(head, "token_adapter")


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters; does not import peft."""
    return type(model).__module__.startswith("peft.")


def adapter_settings(model: nn.Module) -> Any:
    """peft's settings of a wrapped model's first adapter."""
    return _settings(model)[ADAPTER]


def is_meta(model: nn.Module) -> bool:
    """Whether the model was built without weights, on the meta device."""
    return any(weight.is_meta for weight in model.parameters())


def _write_no_card(folder: str) -> None:
    """In place of peft's."""


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write a standard PEFT folder: adapter_model.safetensors in fp32, adapter_config.json naming `base`."""
    _settings(model)[ADAPTER].base_model_name_or_path = base
    # peft's model card is an empty template, which takes longer to fill in than a small adapter to save
    model.create_or_update_model_card = _write_no_card
    # False: else peft also saves embeddings that it guesses were resized; those trained whole are saved anyway.
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)
    file = folder / ADAPTER_FILE
    values = json.loads(file.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(values[name], list):  # a set in peft: sorted, files are reproducible; or a pattern
            values[name] = sorted(values[name])
    if values["modules_to_save"]:  # peft adds its names for heads at every load
        values["modules_to_save"] = list(dict.fromkeys(values["modules_to_save"]))
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_of(parameter: str, adapter: str) -> bool:
    """Whether the weight of this name is an adapter's own."""
    owner = _OWNER.search(parameter)
    return owner is not None and owner[2] == adapter


def _renamed(parameter: str, target: str, source: str) -> str:
    return _OWNER.sub(lambda match: f".{match[1]}.{source}", parameter)


def refuse_changes_of_the_base(model: nn.Module, *further: Any) -> None:
    """UserError where an adapter of the model, or one of these peft settings, changes the base that roles share."""
    for part in (*further, *_settings(model).values()):
        if part.bias != "none" or part.trainable_token_indices:
            raise UserError(
                'roles="shared": an adapter that trains biases or single tokens of the base changes it for the others; '
                'write roles="separate"'
            )


def _put_beside(
    model: nn.Module, name: str, settings: Any, weights: dict[str, Tensor] | None, file: Path
) -> None:
    """Add an adapter and set its weights, held in fp32."""
    _add_beside(model, name, settings)
    _hold_in_fp32(weight for key, weight in model.named_parameters() if is_of(key, name))
    with _without_deprecations():
        _set_weights(model, weights, file, name)


def _add_beside(model: nn.Module, name: str, settings: Any) -> None:
    refuse_changes_of_the_base(model, settings)
    settings = copy.deepcopy(settings)
    settings.base_model_name_or_path = None
    _hold_copied_whole(model, settings)
    # forked: these random weights are overwritten at once, and drawing them must not change later dropout
    with torch.random.fork_rng(devices=_devices(model)), _without_deprecations():
        # not the add_adapter of PeftModelForSequenceClassification, which also wraps modules named like a head
        peft_library().PeftModel.add_adapter(model, name, settings)
    vars(model).pop("_tuner_layers", None)  # it may stand on layers that had no adapter


def _hold_copied_whole(model: nn.Module, settings: Any) -> None:
    """Gather the modules that an adapter copies, or trains rows of, where processes have read their rows alone."""
    modules = [module for _, module in modules_named(model, tuple(settings.modules_to_save or ()))]
    if settings.trainable_token_indices:
        transformer = unwrapped(model)
        layers = (transformer.get_input_embeddings(), transformer.get_output_embeddings())
        modules += [layer for layer in layers if layer is not None]
    hold_whole(model, modules)


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """peft 0.21 reads a name that transformers 5.23 deprecates, and says what it corrects by a layer's kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield


def _settings(model: Any) -> dict[str, Any]:
    """peft's settings of a wrapped model's adapters, by name."""
    return model.peft_config


def _read_settings(folder: Path) -> Any:
    """peft's settings of a saved adapter. Raises UserError where its file is damaged or names what is not known."""
    values = read_adapter_file(folder)
    kind_of(values, folder)
    check_settings(values, peft_library().LoraConfig().to_dict(), folder / ADAPTER_FILE)
    with _adapter_errors(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown fields: those that say something are refused above
        return peft_library().PeftConfig.from_pretrained(str(folder))


def _read_weights(model: nn.Module, file: Path) -> dict[str, Tensor] | None:
    """The weights in an adapter's file; None for a model on the meta device."""
    return None if is_meta(model) else load_file(str(file))


def _set_weights(model: nn.Module, weights: dict[str, Tensor] | None, file: Path, adapter: str) -> None:
    if weights is not None:
        _check_keys(model, set(weights), file, adapter)
        peft_library().set_peft_model_state_dict(model, weights, adapter_name=adapter)


def _meta_head(model: nn.Module) -> Tensor:
    return torch.empty(1, model.config.hidden_size, device="meta")  # type: ignore[union-attr]


@contextmanager
def _adapter_errors(folder: Path) -> Iterator[None]:
    """Turn what libraries raise about an adapter's files into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the files are the user's: whatever a library raises here is about them
        if is_of_device(error):
            raise
        raise UserError(
            f"{folder}: its adapter does not fit the base model or cannot be read "
            f"({first_line(error)}); restore it or train again"
        ) from error


_OWNER = re.compile(
    rf"\.((?:{'|'.join(kind.weight_prefix for kind in KINDS.values())})\w+|modules_to_save|trainable_tokens_delta)"
    r"\.(\w+)(?=\.|$)"
)
"""In a weight's name: the module that peft added, and the name of the adapter it belongs to."""
_SAVED_HEAD = f"base_model.model.{SCORE}.weight"
"""Name of the scalar head in an adapter's file."""


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({weight.device for weight in model.parameters() if weight.device.type == "cuda"}, key=str)


def _train_in_fp32(model: nn.Module) -> None:
    """Hold trained weights in fp32: in bf16, with 8 significant bits, many updates are smaller than half a unit in
    the last place and would be lost."""
    _hold_in_fp32(weight for weight in model.parameters() if weight.requires_grad)


def _hold_in_fp32(weights: Iterable[nn.Parameter]) -> None:
    for weight in weights:
        weight.data = weight.data.float()


def _check_same(requested: config.Adapter, saved: config.Adapter | None, settings: Any, folder: Path) -> None:
    """UserError where the config's adapter is not the saved one; dropout may differ."""
    kind = kind_of(settings, folder)
    if KINDS[type(requested)] is not kind:
        raise UserError(f"adapter: the adapter in {folder} is {kind.name}; {_MERGE_FIRST}")
    values = kind.saved_values(settings)
    if saved is not None:
        values |= {name: getattr(saved, name) for name in kind.tuner_values}
    for name, value in values.items():
        if getattr(requested, name) != value:
            raise UserError(
                f"adapter.{name}={getattr(requested, name)!r}: the adapter in {folder} has {value!r}; {_MERGE_FIRST}"
            )


def _check_keys(model: nn.Module, names: set[str], file: Path, adapter: str) -> None:
    """Every weight must be in the file: peft leaves a missing one at its random start with a mere warning."""
    # False: with peft's "auto" this may ask the hub for the config of the base
    state = peft_library().get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    for kind, wrong in (("missing", set(state) - names), ("unexpected", names - set(state))):
        if wrong:
            raise UserError(
                f"{file}: {len(wrong)} {kind} weights, such as {', '.join(sorted(wrong)[:3])}; "
                "it belongs to another model or is damaged: restore it or train again"
            )
