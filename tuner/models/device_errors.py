"""Errors of the device or of its memory, which say nothing of the file or the setting at hand."""

from __future__ import annotations

import errno

import torch

_FULL = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
)
"""What libraries say where torch raises no OutOfMemoryError: CUDA's driver, cuBLAS, torch's allocator on a CPU."""
_LIBRARIES = ("CUDA", "CUBLAS", "cuBLAS", "cuDNN", "NCCL")
"""How their messages begin."""


def is_memory_full(error: BaseException) -> bool:
    """Whether a GPU's or the machine's memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):  # a file could not be mapped
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


def full_memory(error: BaseException) -> str:
    """Whose memory did not suffice, as an error that `is_memory_full` tells it: the beginning of a sentence."""
    return f"{'the GPU' if is_of_gpu(error) else 'this machine'}'s memory is full"


def is_of_gpu(error: BaseException) -> bool:
    """Whether an error comes from a GPU, or from a library that computes on one or exchanges what one has."""
    of_torch = (torch.OutOfMemoryError, torch.AcceleratorError)
    return isinstance(error, of_torch) or (
        isinstance(error, RuntimeError) and str(error).lstrip().startswith(_LIBRARIES)
    )


def is_of_device(error: BaseException) -> bool:
    """Whether an error is about the device or memory, whatever was being read or computed."""
    return is_memory_full(error) or is_of_gpu(error)
