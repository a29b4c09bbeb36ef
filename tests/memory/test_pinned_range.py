"""Page-locked memory of exact size; calls to CUDA are recorded here, gpu_check makes real ones."""

import gc

import pytest
import torch
from cuda.bindings import runtime

from umtrain.memory import pool_cuda

DONE = (runtime.cudaError_t.cudaSuccess,)


@pytest.fixture
def calls(monkeypatch):
    """What is asked of CUDA, in order."""
    made = []
    for name in ("cudaHostRegister", "cudaHostUnregister", "cudaDeviceSynchronize"):
        monkeypatch.setattr(
            runtime, name, lambda *words, name=name: made.append((name, *words)) or DONE
        )
    return made


def tensor(n_bytes):
    return torch.frombuffer(pool_cuda._PinnedRange.create(n_bytes), dtype=torch.uint8)


def test_a_range_is_whole_pages_locked_while_a_tensor_refers_to_it(calls):
    content = tensor(5 * 4096 + 1)
    address = content.data_ptr()
    assert content.nbytes == 6 * 4096
    assert calls == [("cudaHostRegister", address, 6 * 4096, 0)]
    view = content[10:20]
    del content
    gc.collect()
    view.fill_(7)
    assert len(calls) == 1
    del view
    gc.collect()
    assert calls[1:] == [("cudaDeviceSynchronize",), ("cudaHostUnregister", address)]


def test_what_cuda_refuses_to_lock_is_an_error_and_is_not_unlocked(calls, monkeypatch):
    refused = (runtime.cudaError_t.cudaErrorMemoryAllocation,)
    monkeypatch.setattr(runtime, "cudaHostRegister", lambda *_: refused)
    with pytest.raises(RuntimeError, match="out of memory"):
        tensor(4096)
    gc.collect()
    assert calls == []


def test_memory_that_the_system_does_not_have_is_out_of_memory(calls):
    with pytest.raises(MemoryError, match="bytes to page-lock"):
        tensor(2**60)
    assert calls == []
