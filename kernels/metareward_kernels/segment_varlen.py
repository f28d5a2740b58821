"""`segment_attention` on a GPU by a variable-length flash kernel: flash-attn's where it is installed, else PyTorch's own.

One call serves every segment of the row. A segment's queries are its own tokens; its keys, its ancestors' and its own, are
gathered beside each other, and a causal mask aligned at the bottom right is then exactly what its tokens see. The
gather copies an ancestor once for every segment below it, K >= T keys in all; its backward pass adds up the copies' gradients.
Scores cost what the tree's do, 4 D FLOP a pair and query head; the copies 2 K Hk D numbers written and read.

float16 and bfloat16. Neither kernel has run here on a GPU: tests put a stand-in that computes the same on a CPU in their place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from metareward_kernels import dispatch
from metareward_kernels.segment_tree import VarlenLayout

LARGEST_HEAD = 256
"""Channels of a head that the flash kernels take at most."""


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenLayout, float], Tensor]
"""(query [T,Hq,D], gathered key and value [K,Hk,D], layout, scale) -> [T,Hq,D]; a segment's last query sees its last key."""


def segment_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float, kernel: Kernel
) -> Tensor:
    """`segment_attention` by one call of `kernel`."""
    if layout.most_queries == 0:
        # No tokens: an empty result that still depends on all three.
        return query * (key.sum() + value.sum())
    if layout.keys is not None:
        key, value = key.index_select(0, layout.keys), value.index_select(0, layout.keys)
    return kernel(query, key, value, layout, scale)


def kernel_for(query: Tensor) -> tuple[str, Kernel] | None:
    """Name and kernel for queries [T,Hq,D] like these, or None: not on such a GPU, not such a dtype or head, not installed."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if query.shape[-1] % 8 or query.shape[-1] > LARGEST_HEAD or dispatch.is_plain():
        return None
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    return installed()


@cache
def installed() -> tuple[str, Kernel] | None:
    """The better of the kernels that this process can import, with its name."""
    if find_spec("flash_attn") is not None:
        return "flash-attn", flash_attn_kernel(import_module("flash_attn").flash_attn_varlen_func)
    try:
        module: Any = import_module("torch.nn.attention.varlen")
    except ImportError:  # before PyTorch 2.10
        return None
    known = inspect.signature(module.varlen_attn).parameters
    # Before 2.11 it could not be told the scale.
    return (
        ("varlen_attn", torch_kernel(module.varlen_attn))
        if {"scale", "window_size"} <= known.keys()
        else None
    )


def flash_attn_kernel(function: Callable[..., Tensor]) -> Kernel:
    """flash_attn_varlen_func (2.1 or later: causal from the bottom right)."""

    def run(query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
        return function(
            query,
            key,
            value,
            *layout.arguments,
            softmax_scale=scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return run


def torch_kernel(function: Callable[..., Tensor]) -> Kernel:
    """torch.nn.attention.varlen.varlen_attn: a window of all before and none after is causal from the bottom right."""
    grouped = "enable_gqa" in inspect.signature(function).parameters

    def run(query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
        if grouped:
            options["enable_gqa"] = repeats > 1
        elif repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        return function(
            query,
            key,
            value,
            *layout.arguments,
            **options,
        )

    return run
