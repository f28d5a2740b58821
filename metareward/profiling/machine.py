"""What this machine can do: memory bandwidth and matrix rate, measured with PyTorch, kept in a small file.

The figures are the best of several tries of a large copy, a large triad and a large square product: what a kernel can hope
for, not what the data sheet promises. GPU timing by CUDA events has never run on a GPU.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from metareward.errors import UserError
from metareward.model.data_sheets import EXAMPLES, DataSheet, data_sheet
from metareward.run.jsonl import write_text

TRIES = 12


@dataclass(frozen=True)
class Machine:
    """Measured rates of one device: bandwidth in bytes/s by access pattern, matrix rate in FLOP/s by dtype.

    reached: what share of these limits a model's own sampler and trainer reached here, see calibrate.py; by model name.
    kind: "cpu" or "cuda".
    """

    device: str
    threads: int
    copy: float
    triad: float
    matrix: dict[str, float]
    torch: str
    measured: str
    reached: dict[str, dict[str, float]] = field(default_factory=dict)
    kind: str = "cpu"

    @property
    def bandwidth(self) -> float:
        """Bytes/s: the better of copy and triad."""
        return max(self.copy, self.triad)

    def rate(self, dtype: str) -> float:
        """FLOP/s of products in "bfloat16" or "float32"."""
        return self.matrix[dtype]

    @property
    def sheet(self) -> DataSheet | None:
        """Its data sheet; None for a CPU, or a GPU that is not in the table."""
        return data_sheet(self.device) if self.kind == "cuda" else None


def from_data_sheet(name: str) -> Machine:
    """A GPU that was not measured: the figures of its data sheet.

    Raises:
        UserError: it is not in the table.
    """
    found = data_sheet(name)
    if found is None:
        raise UserError(
            f"{name} is neither a file nor the exact name of a GPU whose data sheet is known (such as {EXAMPLES}): give one of "
            "these, or a file of `metareward profile --machine`"
        )
    matrix = {"bfloat16": found.bfloat16, "float32": found.float32}
    return Machine(name, 0, found.bandwidth, found.bandwidth, matrix, "", "data sheet", kind="cuda")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or "unknown CPU"


def measure(device: torch.device, tries: int = TRIES) -> Machine:
    """Measure bandwidth and matrix rate of a device; takes seconds."""
    large = device.type == "cuda"
    elements = 2**28 if large else 2**25
    size = 8192 if large else 2048
    copy, triad = bandwidths(elements, device, tries)
    matrix = {
        dtype: 2.0 * size**3 / product_seconds(size, getattr(torch, dtype), device, tries)
        for dtype in ("bfloat16", "float32")
    }
    return Machine(
        device=device_name(device),
        threads=torch.get_num_threads(),
        copy=copy,
        triad=triad,
        matrix=matrix,
        torch=str(torch.__version__),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        kind=device.type,
    )


def bandwidths(elements: int, device: torch.device, tries: int) -> tuple[float, float]:
    """Bytes/s of a copy and of a = b + 3 c, on float32 tensors of so many elements."""
    a, b, c = (torch.ones(elements, device=device) for _ in range(3))
    nbytes = elements * a.element_size()
    copy = best_seconds(lambda: a.copy_(b), device, tries)
    triad = best_seconds(lambda: torch.add(b, c, alpha=3.0, out=a), device, tries)
    return 2 * nbytes / copy, 3 * nbytes / triad


def product_seconds(size: int, dtype: torch.dtype, device: torch.device, tries: int) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return best_seconds(lambda: torch.mm(left, right, out=out), device, tries)


def best_seconds(work: Callable[[], Tensor], device: torch.device, tries: int) -> float:
    """The fastest of `tries` calls, after two to warm up."""
    found: list[float] = []
    for _ in range(tries + 2):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            stop.synchronize()
            found.append(start.elapsed_time(stop) / 1e3)
        else:
            began = perf_counter()
            work()
            found.append(perf_counter() - began)
    return min(found[2:])


def default_file() -> Path:
    """machine.json in the user's cache directory (XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "metareward" / "machine.json"


def save(machine: Machine, path: Path) -> None:
    """Write the file, its folder too.

    Raises:
        UserError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(machine), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): give another --machine-file") from None


def load(path: Path) -> Machine:
    """Read a file that `save` wrote.

    Raises:
        UserError: it is not there, or holds something else.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is not there: `metareward profile --machine` measures this machine and writes it"
        )
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        machine = Machine(**found)
        rates = [machine.copy, machine.triad, *(machine.matrix[name] for name in ("bfloat16", "float32"))]
        if not all(rate > 0 for rate in rates):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{path} is not a file of `metareward profile --machine`: delete it and measure again"
        ) from None
    return machine
