"""Freezing weights. Layers below the lowest trained weight then need no backward pass."""

from fnmatch import fnmatchcase

from torch import nn

from tuner import config
from tuner.errors import UserError
from tuner.models.unwrap import unwrapped


def freeze(model: nn.Module, part: config.Freeze | None) -> None:
    """Freeze some of the trained weights, in place: the model's, or its adapters'.

    Raises UserError when a pattern matches nothing, there are fewer layers, or nothing is left to train.
    """
    if part is None:
        return
    weights = {plain_name(name): weight for name, weight in model.named_parameters() if weight.requires_grad}
    frozen = _below(model, weights, part.all_but_last_layers) if part.all_but_last_layers else set()
    for pattern in part.names:
        matches = {name for name in weights if fnmatchcase(name, pattern)}
        if not matches:
            raise UserError(
                f"freeze.names: {pattern!r} matches no trained weight; "
                f"correct it: there are {_some(weights)} and others"
            )
        frozen |= matches
    if len(frozen) == len(weights):
        raise UserError("freeze: nothing is left to train; freeze fewer layers or names")
    for name in frozen:
        weights[name].requires_grad_(False)


def plain_name(name: str) -> str:
    """A parameter name without peft's additions, such as `model.layers.0.self_attn.q_proj.lora_A.weight`."""
    plain = name.removeprefix("base_model.model.")
    for addition in (".modules_to_save.default", ".default", ".base_layer"):
        plain = plain.replace(addition, "")
    return plain


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Plain name and module of the decoder's list of layers. Raises UserError when there is none."""
    depth = unwrapped(model).config.num_hidden_layers
    for name, module in model.named_modules():
        # by its length: families name the list differently
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return plain_name(name), module
    raise UserError(
        f"{type(model).__name__} has no stack of layers, as freeze.all_but_last_layers and parallel.shard need; use "
        "freeze.names, or leave parallel out"
    )


def _below(model: nn.Module, weights: dict[str, nn.Parameter], num_trained: int) -> set[str]:
    """Names of the trained weights below the last `num_trained` layers."""
    stack, layers = decoder_layers(model)
    if num_trained > len(layers):
        raise UserError(
            f"freeze.all_but_last_layers={num_trained}: the model has {len(layers)} layers; give fewer"
        )
    # with a trained embedding the backward pass would run through all frozen layers down to it
    embedding = _name_of(model, unwrapped(model).get_input_embeddings())
    below = [f"{stack}.{index}." for index in range(len(layers) - num_trained)] + [f"{embedding}."]
    return {name for name in weights if name.startswith(tuple(below))}


def _name_of(model: nn.Module, target: nn.Module) -> str:
    return next(plain_name(name) for name, module in model.named_modules() if module is target)


def _some(names: dict[str, nn.Parameter]) -> str:
    return ", ".join(list(names)[:3])
