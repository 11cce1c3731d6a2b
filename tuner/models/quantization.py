"""The only module that imports bitsandbytes: quantized frozen weights, their dequantization, 8-bit optimizers."""

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Quantization = Literal["nf4", "int8"]


@functools.cache
def bitsandbytes() -> ModuleType:
    """The library, imported without its warnings about optional kernels."""
    with _quiet("bitsandbytes.backends.cpu.ops"):
        import bitsandbytes as library
    # warns at every forward pass of an 8-bit layer that activations are cast
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return library


def quantization_config(
    quantization: Quantization, compute_dtype: torch.dtype, whole: list[str] | None = None
) -> Any:
    """The BitsAndBytesConfig that quantizes a model's linear layers except the head while it is loaded.

    nf4: 4-bit NormalFloat with double-quantized scales (QLoRA, Dettmers et al., 2023); int8: LLM.int8() (Dettmers et
    al., 2022). whole: names of modules that are not quantized, for heads that transformers does not recognize.
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


@contextmanager
def after_quantizing(do: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Inside it, something is done with each weight once it is quantized to 4 bit, while a model is loaded."""
    bitsandbytes()
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class Watched(Bnb4bitQuantize):
        def convert(self, *arguments: Any, **settings: Any) -> Any:
            weights: Any = super().convert(*arguments, **settings)
            for weight in weights.values():
                do(weight)
            return weights

    # transformers has no hook between two weights, and a model that is quantized whole first would need the memory
    original, quantizer = Bnb4BitHfQuantizer.get_quantize_ops, cast(Any, Bnb4BitHfQuantizer)
    quantizer.get_quantize_ops = lambda self: Watched(self)
    try:
        yield
    finally:
        quantizer.get_quantize_ops = original


def keep_unpacked(model: nn.Module) -> None:
    """Stop 4-bit layers from repacking their weights in place for inference on CPUs with AVX512-BF16.

    bitsandbytes 0.50 repacks in the first pass in eval mode without gradients, such as generation; later training
    passes then silently lose the gradient through every frozen 4-bit layer.
    """
    for _, layer in quantized_layers(model):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make 4-bit layers compute in a dtype, whatever the file says that they were quantized with."""
    for _, layer in quantized_layers(model):
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = dtype


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every quantized linear layer; does not import bitsandbytes."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear):
            yield name, module


def dequantized_weight(layer: Any) -> Tensor:
    """The weight of a quantized layer, [out, in], in fp32 without rounding to the layer's compute dtype."""
    functional = bitsandbytes().functional
    weight = layer.weight
    if weight.dtype == torch.int8:
        # the first forward pass moves the scales from the weight to the layer's state
        scales = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        return functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device)).float()
    # a copy: the layer itself goes on dequantizing to its compute dtype
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    return functional.dequantize_4bit(weight.data, state)


def is_in_4_bit(layer: nn.Module) -> bool:
    """Whether a linear layer is one of bitsandbytes' in 4 bit; does not import it."""
    return type(layer).__module__.startswith("bitsandbytes.") and hasattr(layer, "compute_dtype")


def product_in_4_bit(layer: Any, rows_TD: Tensor) -> Tensor:
    """What a 4-bit layer makes of rows in its compute dtype, [T, D] -> [T, O], by its own kernels."""
    library, bias_O = bitsandbytes(), layer.bias
    library.nn.modules.fix_4bit_weight_quant_state_from_module(layer)  # which FSDP loses
    state = layer.weight.quant_state
    bias_O = None if bias_O is None else bias_O.to(rows_TD.dtype)
    return library.matmul_4bit(rows_TD, layer.weight, bias=bias_O, quant_state=state)


def weight_from_4_bit(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a 4-bit layer, [O, D], as its own backward pass takes it: in the dtype that was quantized."""
    library = bitsandbytes()
    library.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
    return library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)


def dequantize(model: nn.Module) -> None:
    """Replace the quantized layers by fp32 linear ones; the model is then as if it had never been quantized."""
    for name, layer in list(quantized_layers(model)):
        model.set_submodule(name, _plain(layer))
    _forget_quantization(model)


def _plain(layer: Any) -> nn.Module:
    """The layer that a quantized one was made from, in fp32."""
    bias = None if layer.bias is None else nn.Parameter(layer.bias.data.float(), requires_grad=False)
    weight = dequantized_weight(layer)
    if (
        getattr(layer, "source_cls", nn.Linear) is Conv1D
    ):  # saved as a linear layer, GPT-2's would be transposed
        plain: Any = Conv1D(layer.out_features, layer.in_features)
        plain.weight, plain.bias = nn.Parameter(weight.T.contiguous(), requires_grad=False), bias
        return plain
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), bias
    return plain


def optimizer_class(bits: Literal[32, 8], paged: bool) -> type[torch.optim.Optimizer]:
    """The AdamW with this state: torch's own for 32 bits, bitsandbytes' for 8 bits or paged state."""
    if bits == 32 and not paged:
        return torch.optim.AdamW
    optim = bitsandbytes().optim
    # on CPU bitsandbytes takes unpaged state for paged, without an error
    if paged:
        return optim.PagedAdamW8bit if bits == 8 else optim.PagedAdamW32bit
    return optim.AdamW8bit


def _forget_quantization(model: Any) -> None:
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
    # they contain the quantizer's steps; without them transformers uses the class's own
    vars(model).pop("_weight_conversions", None)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
