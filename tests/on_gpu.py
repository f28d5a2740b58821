"""CPU tensors in, CPU tensors out, computed on the GPU: lets a test of an op run there as it is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def run_on_gpu(function: Callable, *arguments: Any, **named: Any) -> Any:
    """Call with copies of all tensors (strides kept) on the GPU; what it changed in place is copied back."""
    moved: list[tuple[Tensor, Tensor]] = []

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            if any(stride == 0 for stride in value.stride()):
                return value.to("cuda")  # expanded: nothing can have been written in place
            there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda").copy_(
                value
            )
            moved.append((value, there))
            return there
        if isinstance(value, tuple):
            parts = [move(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    result = function(*move(arguments), **{name: move(value) for name, value in named.items()})
    for here, there in moved:
        here.copy_(there)
    return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()


def on_gpu(function: Callable) -> Callable:
    """The function, computed on the GPU."""

    @wraps(function)
    def moved(*arguments: Any, **named: Any) -> Any:
        return run_on_gpu(function, *arguments, **named)

    return moved
