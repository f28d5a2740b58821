"""Causal attention over sequences packed one after another in a row, without padding.

On a GPU one variable-length kernel serves the whole row, when flash-attn is installed. Elsewhere each
sequence is one call of PyTorch's scaled_dot_product_attention, whose CPU flash kernel takes grouped key
heads as they are (`enable_gqa`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metareward.model.decoder import Attend


@cache
def flash_varlen() -> Callable[..., Tensor] | None:
    """flash-attn's variable-length kernel, or None where the package is not installed."""
    if find_spec("flash_attn") is None:
        return None
    module: Any = import_module("flash_attn")
    return module.flash_attn_varlen_func


def packed_attention(cu_seqlens: Sequence[int] | Tensor) -> Attend:
    """An `Attend` for sequences that begin and end at cu_seqlens = [0, end of the first, ..., T].

    Every query sees the keys of its own sequence up to its own position. fp32 and bf16, differentiable.
    Raises ValueError when the boundaries do not ascend from 0, or do not fit the row they are used on.
    """
    bounds = [int(b) for b in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
    if len(bounds) < 2 or bounds[0] != 0 or any(end <= start for start, end in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must ascend from 0, got {bounds}")
    longest = max(end - start for start, end in pairwise(bounds))
    on_device: dict[torch.device, Tensor] = {}

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[0] != bounds[-1]:
            raise ValueError(f"cu_seqlens ends at {bounds[-1]} but the row has {query.shape[0]} tokens")
        varlen = flash_varlen() if query.is_cuda and query.dtype != torch.float32 else None
        if varlen is None:
            return _attend_each(query, key, value, bounds)
        if query.device not in on_device:
            on_device[query.device] = torch.tensor(bounds, dtype=torch.int32, device=query.device)
        offsets = on_device[query.device]
        return varlen(query, key, value, offsets, offsets, longest, longest, causal=True)

    return attend


def _attend_each(query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    outs = []
    for start, end in pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        outs.append(out.squeeze(0).transpose(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)
