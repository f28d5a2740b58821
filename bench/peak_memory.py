"""Peak memory of one call, in bytes above what was held before it.

On CUDA the allocator counts. On the CPU the kernel does: the high-water mark of resident memory (VmHWM) is set back
before the call (Linux; /proc/self/clear_refs). That sees what the allocator of PyTorch does not, such as a library's
scratch memory and the copies it packs. Call once to warm up first: else libraries that are read in count too.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch

Result = TypeVar("Result")
PROCESS = Path("/proc/self")


def timed_with_peak(call: Callable[[], Result], device: str) -> tuple[Result, float, int | None]:
    """The result, the seconds it took, and the peak of memory above that before the call, the result's own included.

    The peak is None where the system cannot tell.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = perf_counter()
        result = call()
        torch.cuda.synchronize()
        return result, perf_counter() - start, torch.cuda.max_memory_allocated() - before
    known = reset_high_water_mark()
    resident = status_bytes("VmRSS")
    start = perf_counter()
    result = call()
    seconds = perf_counter() - start
    return result, seconds, max(0, status_bytes("VmHWM") - resident) if known else None


def reset_high_water_mark() -> bool:
    """Give freed memory back, and start VmHWM anew; False where that cannot be done."""
    try:
        # Freed blocks that stay in the heap would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def status_bytes(field: str) -> int:
    """Bytes of a field of /proc/self/status; 0 where there is none."""
    try:
        text = (PROCESS / "status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def available_bytes(device: str) -> int | None:
    """Memory that can be had now; None where the system cannot tell."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None
