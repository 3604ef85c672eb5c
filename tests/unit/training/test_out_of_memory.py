"""Running out of memory is one line, whoever says it; another error stays what it is."""

import pytest
import torch

from bitnet_train.errors import RunFailed
from bitnet_train.training.out_of_memory import building, explained


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34.00 MiB."),
        RuntimeError("CUDA error: out of memory"),  # the driver, not torch's allocator
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_it_is_explained(error: Exception) -> None:
    with pytest.raises(RunFailed, match="out of memory on rank 0, while the model is built"), explained(building):
        raise error


def test_another_error_is_not() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"), explained(building):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
