"""Which implementation of each op runs: "cpp" (compiled, CPU) or "torch" (plain PyTorch, any device).

The choice is made here and nowhere else. The compiled library is loaded on the first question about it; when it
is missing, one warning is logged a process and the PyTorch path runs. The environment variable METAREWARD_KERNELS
forces an implementation: `torch` never uses the compiled library, `cpp` raises where the compiled op cannot run.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("metareward_kernels")

OPS = (
    "linear_logprob",
    "paged_attention",
    "sample_tokens",
    "keyed_uniforms",
    "add_rms_norm",
    "rotate_and_store",
    "silu_mul",
)
ENVIRONMENT_VARIABLE = "METAREWARD_KERNELS"
CHOICES = ("torch", "cpp")


@cache
def _load_library() -> str | None:
    """Load the compiled library once a process; the reason why it is not there, or None when it is."""
    folder = Path(__file__).parent
    found = sorted(folder.glob("_C*.so"))
    if not found:
        return f"no compiled library in {folder}"
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:  # built for another torch, or a file cut short
        return f"{found[0].name} does not load with torch {torch.__version__}: {error}"
    from metareward_kernels import cpp_fakes

    cpp_fakes.register()
    return None


@cache
def _warn_once(reason: str) -> None:
    logger.warning(
        "%s: using the slower PyTorch path; build with "
        "`METAREWARD_BUILD=on pip install --no-build-isolation -e .` in the source folder",
        reason,
    )


def _forced() -> str | None:
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value == "":
        return None
    if value not in CHOICES:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={value!r} is not one of {', '.join(CHOICES)}; unset it to choose freely"
        )
    return value


def implementation(op: str, device: str = "cpu", unsupported: str | None = None) -> str:
    """The implementation that `op` runs with on `device`: "cpp" or "torch".

    unsupported: what about the inputs at hand the compiled op cannot take (a phrase), or None.
    Raises ValueError for an unknown op or a bad METAREWARD_KERNELS, and RuntimeError when METAREWARD_KERNELS=cpp
    asks for a compiled op that cannot run here.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
    forced = _forced()
    if forced == "torch":
        return "torch"
    reason = f"the compiled ops run on the CPU, not on {device}" if device != "cpu" else _load_library()
    if device == "cpu" and reason is not None and forced is None:
        _warn_once(reason)
    reason = reason or unsupported
    if reason is None:
        return "cpp"
    if forced == "cpp":
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}=cpp, but {op} cannot run compiled: {reason}")
    return "torch"


def report(device: str = "cpu") -> dict[str, str]:
    """Implementation of every op on `device`, for logs and benchmark records."""
    return {op: implementation(op, device) for op in OPS}
