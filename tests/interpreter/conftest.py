"""The Triton kernels in Triton's interpreter, or compiled where there is a GPU (they have never been run on one).

Triton decides at import, so the interpreter needs a process of its own:
`TRITON_INTERPRET=1 python -m pytest tests/interpreter`; tests/kernels/test_interpreter.py starts one.
bf16 products and casts are wrong in the interpreter (casts cut off, products are garbage): fp32 and fp16 here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


def run_on_gpu(launcher: Callable, *arguments: Any, **named: Any) -> Any:
    """Call with copies of all tensors (strides kept) on the GPU; what it changed in place is copied back."""
    moved: list[tuple[Tensor, Tensor]] = []

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda").copy_(
                value
            )
            moved.append((value, there))
            return there
        if isinstance(value, tuple):
            parts = [move(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    result = launcher(*move(arguments), **{name: move(value) for name, value in named.items()})
    for here, there in moved:
        here.copy_(there)
    return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()


def run_here(launcher: Callable, *arguments: Any, **named: Any) -> Any:
    return launcher(*arguments, **named)


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """run(launcher, arguments ...): CPU tensors in, CPU tensors out."""
    return run_here if INTERPRETED else run_on_gpu
