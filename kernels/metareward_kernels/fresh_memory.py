"""Large fresh tensors on a CPU whose pages cost little.

A tensor that is made anew is cleared by the system on first use, 4 KB at a time unless the system is told that it is worth
2 MB pages (Linux, where transparent huge pages are set to "madvise"). It is advice alone: it may be refused, and results
are the same.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return found


def advise_huge_pages(x: Tensor) -> Tensor:
    """x, after the advice for the whole 2 MB pages inside of it. Of use before its first write; on the CPU alone."""
    begin = -(-x.data_ptr() // PAGE) * PAGE
    size = (x.data_ptr() + x.nbytes) // PAGE * PAGE - begin
    madvise = _madvise() if x.device.type == "cpu" and size > 0 else None
    if madvise is not None:
        madvise(begin, size, mmap.MADV_HUGEPAGE)
    return x


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [*shape], as torch.empty makes it."""
    return advise_huge_pages(torch.empty(shape, dtype=dtype, device=device))
