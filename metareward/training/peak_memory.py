"""The memory that an optimizer step really took, by phase.

On a GPU the most bytes of tensors that were allocated in a phase. On a CPU the kernel keeps one peak of the whole process
(VmHWM): each phase has the highest until its end, libraries included. Has not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from metareward.model.decoder import Decoder

STATUS = Path("/proc/self/status")


def process_memory(name: str) -> int:
    """Bytes of this process: "VmHWM", the peak of its resident memory, or "VmRSS", what it is now; 0 where there is no /proc."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0


def peak_since_reset(device: torch.device) -> int:
    """The highest since the last call on a GPU, which starts it anew; since the process began on a CPU."""
    if device.type != "cuda":
        return process_memory("VmHWM")
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def give_back_freed(device: torch.device) -> None:
    """On a CPU under glibc, hand the memory of freed tensors back to the system.

    The heap keeps it otherwise. Activations are freed in pieces that the optimizer's large tensors do not fit into, so both
    would count for the peak. A GPU's caching allocator does this itself when it runs out.
    """
    if device.type == "cpu":
        # Other C libraries do not have it.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def measured_phases(
    decoder: Decoder, optimizer: torch.optim.Optimizer, device: torch.device
) -> Iterator[dict[str, float]]:
    """Around one optimizer step: fills the dictionary with `peak_bytes_<phase>` of forward (the decoder's), backward (with the
    loss, the head and the reduction of gradients) and optimizer."""
    found: dict[str, float] = {}

    def ends(phase: str) -> Any:
        def note(*_: Any) -> None:
            name = f"peak_bytes_{phase}"
            found[name] = max(found.get(name, 0.0), float(peak_since_reset(device)))

        return note

    peak_since_reset(device)
    handles = [
        # A micro-batch's forward pass begins where the backward pass of the one before has ended.
        decoder.register_forward_pre_hook(ends("backward")),
        decoder.register_forward_hook(ends("forward")),
        optimizer.register_step_pre_hook(ends("backward")),
        optimizer.register_step_post_hook(ends("optimizer")),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
