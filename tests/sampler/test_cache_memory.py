"""Memory of the key-value pages: a tensor like any other, whether it lies in huge pages or not."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from metareward.sampler.cache_memory import HUGE_PAGE, empty_pages

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pages", [0, 1, 700])  # the last is more than a huge page
def test_holds_what_is_written_as_long_as_a_view_lives(pages: int, dtype: torch.dtype) -> None:
    shape = (pages, 3, 16, 64)
    memory = empty_pages(shape, dtype, CPU)
    assert memory.shape == shape
    assert memory.dtype == dtype
    assert memory.is_contiguous()
    assert (pages < 700) == (memory.nbytes < HUGE_PAGE)
    values = torch.randn(shape).to(dtype)
    view = memory.copy_(values).transpose(1, 2)
    del memory
    gc.collect()
    assert torch.equal(view, values.transpose(1, 2))


def test_a_kernel_without_huge_pages_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)  # advice that no kernel knows
    assert float(empty_pages((HUGE_PAGE,), torch.float32, CPU).fill_(2.0).sum()) == 2.0 * HUGE_PAGE
