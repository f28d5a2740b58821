"""What every benchmark's file says besides its figures: machine, versions, commit, date."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from metareward.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy", "metareward")


def environment(*peers: str) -> dict[str, Any]:
    """The fields of a record that describe where and with what it was made; `peers` are further packages."""
    return {
        "machine": machine(),
        "versions": versions(*peers),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    """CPU model, instruction set, the cores this process may use, PyTorch's threads, memory; and the GPU."""
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return found


def cpu_model() -> str:
    """The processor's own name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def file_words(device: str) -> str:
    """The device's name as it begins the names of result files: "nvidia-h100-80gb-hbm3"."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions(*peers: str) -> dict[str, str | None]:
    """Version of Python and of each package; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*PACKAGES, *peers):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The checkout's commit, with "-dirty" behind it when tracked files differ; None outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def check_writable(path: Path) -> None:
    """Refuse a place that cannot be written before the measuring begins, not an hour later.

    Raises:
        UserError: `path` is a folder, or its folder cannot be made or written.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent} ({error.strerror}): give another") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: give another place")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record in one go, so that a reader never sees half of it."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
