"""Which implementation of each op runs: "triton" (CUDA), "cpp" (compiled, CPU) or "torch" (plain PyTorch, any device);
"cuda" (CUDA C++, CUDA_OPS only) where it is asked for.

The choice is made here and nowhere else. The compiled library is loaded, and Triton imported, on the first question
about it; when it is missing, one warning is logged a process and the PyTorch path runs. The environment variable
METAREWARD_KERNELS forces an implementation: `torch` uses neither, `cpp` and `triton` raise where the op cannot run so
(under `cpp` an op of PYTORCH_ON_CPU still runs in PyTorch), and `cuda` where one of CUDA_OPS cannot; the other ops are
then chosen freely. Neither the Triton nor the CUDA kernels have ever run on a GPU; without one they run in Triton's
interpreter, and the CUDA ones compiled for the CPU, in tests.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("metareward_kernels")

OPS = (
    "linear_logprob",
    "head_rows",
    "linear_fp32",
    "linear_softmax",
    "dpo_loss",
    "paged_attention",
    "segment_attention",
    "sample_tokens",
    "keyed_uniforms",
    "add_rms_norm",
    "rotate_and_store",
    "silu_mul",
    "decoder_layers",
)
CUDA_OPS = frozenset(("head_rows",))
ENVIRONMENT_VARIABLE = "METAREWARD_KERNELS"
CHOICES = ("torch", "cpp", "triton", "cuda")
TRITON_OPS = frozenset(
    (
        "linear_logprob",
        "head_rows",
        "dpo_loss",
        "paged_attention",
        "sample_tokens",
        "keyed_uniforms",
        "add_rms_norm",
        "rotate_and_store",
        "silu_mul",
    )
)
PYTORCH_ON_CPU = frozenset(("dpo_loss",))  # a few numbers: no compiled op, nothing to miss


@cache
def _load_library() -> str | None:
    """Load the compiled library once a process; the reason why it is not there, or None when it is."""
    folder = Path(__file__).parent
    found = sorted(folder.glob("_C.*"))
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
def _import_triton() -> str | None:
    """The reason why Triton is not there, or None when it is."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not importable ({error})"
    return None


@cache
def _warn_once(reason: str, remedy: str) -> None:
    logger.warning("%s: using the slower PyTorch path; %s", reason, remedy)


@cache
def _missing_instructions(op: str) -> str | None:
    """What this CPU lacks for an op of the loaded library, or None. Most ops are compiled for any CPU."""
    if (
        op in ("linear_fp32", "linear_softmax", "decoder_layers")
        and not torch.ops.metareward.bf16_linear_supported()
    ):
        return "this CPU has no AVX-512 BF16"
    return None


def _forced() -> str | None:
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value == "":
        return None
    if value not in CHOICES:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={value!r} is not one of {', '.join(CHOICES)}; unset it to choose freely"
        )
    return value


def is_plain() -> bool:
    """Whether METAREWARD_KERNELS asks for plain PyTorch."""
    return _forced() == "torch"


def _missing_for_triton(op: str, device: str) -> str | None:
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the Triton ops run on CUDA, not on {device}"
    return _import_triton() if op in TRITON_OPS else f"{op} has no Triton kernel"


def _missing_for_cuda(device: str) -> str | None:
    if device != "cuda":
        return f"the CUDA kernels run on CUDA, not on {device}"
    from metareward_kernels import cuda_head_rows

    return cuda_head_rows.load_library()


def _missing_for_cpp(device: str) -> str | None:
    return f"the compiled ops run on the CPU, not on {device}" if device != "cpu" else _load_library()


def unsupported_dtype(implementation: str, dtype: torch.dtype) -> str | None:
    """Why the kernels of `implementation` cannot take `dtype` (a phrase), or None."""
    if implementation == "triton":
        known = dtype in (torch.float32, torch.float16, torch.bfloat16)
        return None if known else f"the Triton kernel takes float32, float16 and bfloat16, not {dtype}"
    if implementation == "cuda":
        known = dtype in (torch.float32, torch.float16, torch.bfloat16)
        return None if known else f"the CUDA kernel takes float32, float16 and bfloat16, not {dtype}"
    known = dtype in (torch.float32, torch.bfloat16)
    return None if known else f"the compiled op takes float32 and bfloat16, not {dtype}"


def implementation(
    op: str, device: str = "cpu", unsupported: str | Callable[[str], str | None] | None = None
) -> str:
    """The implementation that `op` runs with on `device`: "triton", "cuda", "cpp" or "torch".

    unsupported: what about the inputs at hand the device's own kernel cannot take (a phrase), or None; or a function
    that says so for "triton", "cuda" or "cpp", and is called only where that can be loaded.
    Raises ValueError for an unknown op or a bad METAREWARD_KERNELS, and RuntimeError when METAREWARD_KERNELS asks for
    an implementation that cannot run here.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
    forced = _forced()
    if forced == "torch":
        return "torch"
    if op in PYTORCH_ON_CPU and device == "cpu" and forced != "triton":
        return "torch"
    if forced == "cuda" and op not in CUDA_OPS:
        forced = None
    wanted = forced or ("cpp" if device == "cpu" else "triton")
    if wanted == "triton":
        reason = _missing_for_triton(op, device)
    else:
        reason = _missing_for_cuda(device) if wanted == "cuda" else _missing_for_cpp(device)
    if forced is None and reason is not None:
        if device == "cpu":
            _warn_once(
                reason,
                "build with `METAREWARD_BUILD=on pip install --no-build-isolation -e .` in the source folder",
            )
        elif device == "cuda" and op in TRITON_OPS:
            _warn_once(reason, "install the triton that fits your PyTorch")
    if reason is None:
        reason = unsupported(wanted) if callable(unsupported) else unsupported
    if reason is None and wanted == "cpp":
        reason = _missing_instructions(op)
    if reason is None:
        return wanted
    if forced is not None:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={forced}, but {op} cannot run so: {reason}")
    return "torch"


def report(device: str = "cpu") -> dict[str, str]:
    """Implementation of every op on `device`, for logs and benchmark records."""
    return {op: implementation(op, device) for op in OPS}
