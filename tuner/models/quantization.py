"""The bitsandbytes door: quantising frozen weights, taking them back to full precision, 8-bit optimisers."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

Quantization = Literal["nf4", "int8"]


def bitsandbytes() -> ModuleType:
    """The library, imported without its advice about kernels that would be fetched from a hub."""
    with _quiet("bitsandbytes.backends.cpu.ops"):
        import bitsandbytes as library
    # It says at every forward pass of an 8-bit layer that activations are cast.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return library


def quantization_config(
    quantization: Quantization, compute_dtype: torch.dtype, whole: list[str] | None = None
) -> Any:
    """The BitsAndBytesConfig that quantises a model's linear layers, all but the head, while it is loaded.

    whole: names of modules to leave as they are, where transformers does not know the head.

    nf4: 4-bit NormalFloat with double-quantised scales (QLoRA, Dettmers et al., 2023); int8: LLM.int8().
    """
    bitsandbytes()
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=whole,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_unpacked(model: nn.Module) -> None:
    """Forbid 4-bit layers to repack their weights in place for inference on CPUs with AVX512-BF16.

    After the repacking (bitsandbytes 0.50, in eval without grad: what generating does) later training passes
    silently lose the gradient through every frozen 4-bit layer.
    """
    for _, layer in quantised_layers(model):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every quantised linear layer; costs no bitsandbytes where there is none."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear):
            yield name, module


def dequantised(layer: nn.Module) -> Tensor:
    """The weight a quantised layer stands for, (out, in), in fp32 without rounding to its compute dtype."""
    functional = bitsandbytes().functional
    weight = layer.weight
    if weight.dtype == torch.int8:
        scales = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        return functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device)).float()
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    return functional.dequantize_4bit(weight.data, state)


def dequantise(model: nn.Module) -> None:
    """Put plain fp32 linear layers in place of the quantised ones; the model then is an ordinary one."""
    for name, layer in list(quantised_layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(dequantised(layer), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.data.float(), requires_grad=False)
        model.set_submodule(name, plain)
    _forget_quantisation(model)


def optimizer_class(bits: Literal[32, 8], paged: bool) -> type[torch.optim.Optimizer]:
    """The AdamW with such state: torch's own for plain 32 bits, bitsandbytes' for 8 bits and paged state."""
    if bits == 32 and not paged:
        return torch.optim.AdamW
    optim = bitsandbytes().optim
    if paged:
        return optim.PagedAdamW8bit if bits == 8 else optim.PagedAdamW32bit
    return optim.AdamW8bit


def _forget_quantisation(model: nn.Module) -> None:
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in (
        "hf_quantizer",
        "quantization_method",
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
        "is_quantized",
    ):
        if name in vars(model):
            delattr(model, name)
    if "_weight_conversions" in vars(
        model
    ):  # they carry the quantiser's steps; the class's own are found anew
        delattr(model, "_weight_conversions")


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
