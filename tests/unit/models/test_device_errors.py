"""What a device or a full memory raises is no fault of the files that are being read."""

import errno
from pathlib import Path

import pytest
import torch

from tuner.errors import UserError
from tuner.models.adapters import _adapter_errors
from tuner.models.device_errors import is_memory_full
from tuner.models.load import _blaming

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError(CUBLAS),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
BROKEN = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error"),
]
OF_FILES = [
    RuntimeError("Error(s) in loading state_dict: size mismatch"),
    ValueError("CUDA is no key of this file"),
    OSError(errno.ENOENT, "No such file"),
]


@pytest.mark.parametrize("reading", [_blaming, _adapter_errors])
@pytest.mark.parametrize("error", [*FULL, *BROKEN], ids=repr)
def test_errors_of_the_device_pass_as_they_are(reading, error):
    with pytest.raises(type(error)) as raised, reading(Path("model")):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("reading", [_blaming, _adapter_errors])
@pytest.mark.parametrize("error", OF_FILES, ids=repr)
def test_other_errors_are_about_the_files(reading, error):
    with pytest.raises(UserError, match=r"model: .*restore"), reading(Path("model")):
        raise error


def test_which_of_them_are_of_memory():
    assert all(map(is_memory_full, FULL))
    assert not any(map(is_memory_full, [*BROKEN, *OF_FILES]))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)  # more than the addresses of a process
    assert is_memory_full(raised.value)
