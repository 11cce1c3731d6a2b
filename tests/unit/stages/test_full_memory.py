"""A run whose memory is full says which fields to lower, whoever ran out of it, and may go on with other values."""

import pytest
import torch

import tuner
from tests.equivalence.conftest import SMALL
from tuner.errors import UserError
from tuner.stages.registry import stage_of

CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "the GPU's"),
        (torch.AcceleratorError("CUDA error: out of memory"), "the GPU's"),
        (CUBLAS, "the GPU's"),
        (MemoryError(), "this machine's"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "this machine's"),
    ],
    ids=repr,
)
def test_the_fields_to_lower_are_named(error, whose, tmp_path, monkeypatch):
    def fail(config, context):
        raise error

    monkeypatch.setattr(stage_of(SMALL), "train", fail)
    with pytest.raises(UserError, match=f"{whose} memory is full; lower tokens_per_pass") as raised:
        tuner.train(SMALL, runs=tmp_path)
    assert raised.value.__cause__ is error


def test_other_errors_of_the_device_are_told_as_they_are(tmp_path, monkeypatch):
    def fail(config, context):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(stage_of(SMALL), "train", fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        tuner.train(SMALL, runs=tmp_path)
