"""What `linear_preference` refuses, in one sentence each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _indices(x: Tensor, name: str, shape: str) -> list[Any]:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} {shape} must hold integers, got {x.dtype}")
    return x.tolist()


def check_tensors(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> None:
    known = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if hidden.dtype not in known or weight.dtype != hidden.dtype:
        raise TypeError(
            "hidden and weight must have one dtype of float64, float32, bfloat16 and float16, "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden [T,H] and weight [V,H], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need one target a token, got {list(targets.shape)} for {hidden.shape[0]} tokens")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"need a floating bias [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
    if hidden.device.type not in ("cpu", "cuda") or any(
        x is not None and x.device != hidden.device for x in (weight, targets, bias)
    ):
        raise ValueError(
            f"hidden, weight, targets and bias must lie on one CPU or CUDA device, hidden is on {hidden.device}"
        )
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if targets.numel():
        low, high = torch.stack([targets.min(), targets.max()]).tolist()
        if low < 0 or high >= weight.shape[0]:
            raise IndexError(
                f"targets span [{low}, {high}], outside the vocabulary's [0, {weight.shape[0] - 1}]"
            )


def check_layout(cu_seqlens: Tensor, pairs: Tensor, tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
    starts = _indices(cu_seqlens, "cu_seqlens", "[S+1]")
    if (
        cu_seqlens.dim() != 1
        or not starts
        or starts[0] != 0
        or starts[-1] != tokens
        or starts != sorted(starts)
    ):
        raise ValueError(
            f"cu_seqlens [S+1] must ascend from 0 to the {tokens} tokens of hidden, got {starts}"
        )
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"pairs must be [P,2], chosen and rejected sequence of each, got {list(pairs.shape)}"
        )
    found = [(chosen, rejected) for chosen, rejected in _indices(pairs, "pairs", "[P,2]")]
    for pair in found:
        if not all(0 <= s < len(starts) - 1 for s in pair):
            raise IndexError(f"pair {pair} names a sequence outside of the {len(starts) - 1} of cu_seqlens")
        if pair[0] == pair[1]:
            raise ValueError(f"pair {pair} compares a sequence with itself; leave it out")
    return starts, found


def check_vector(x: Tensor, name: str, size: int) -> None:
    if x.shape != (size,) or not x.is_floating_point():
        raise ValueError(f"{name} must be floating [{size}], got {x.dtype} {list(x.shape)}")
    if x.requires_grad:
        raise ValueError(f"{name} gets no gradient; detach it")
