"""What freed tensors leave in the heap goes back to the system before the optimizer asks for more."""

from __future__ import annotations

import platform

import pytest
import torch

from metareward.training.peak_memory import give_back_freed, process_memory

MIB = 2**20
# Below the size from which glibc maps a tensor by itself and so gives it back at once.
SIZE, COUNT = MIB // 16, 2048


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's heap")
def test_freed_memory_leaves_the_process() -> None:
    tensors = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(COUNT)]
    full = process_memory("VmRSS")
    # Every 64th stays, so that the heap cannot shrink from its end.
    kept = tensors[::64]
    del tensors
    left = process_memory("VmRSS")
    give_back_freed(torch.device("cpu"))
    assert process_memory("VmRSS") < full - 0.8 * SIZE * COUNT
    assert left > full - 0.2 * SIZE * COUNT
    assert all(bool((tensor == 1).all()) for tensor in kept)
