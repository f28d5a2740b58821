"""Peak memory of this process since a moment: what a GPU's allocator or the kernel (VmHWM) has seen.

Has run on CPUs only, never on a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Start the peak anew. Where the system cannot (not Linux), the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """Most bytes held since the last reset: allocated tensors on a GPU, resident memory on a CPU; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0
