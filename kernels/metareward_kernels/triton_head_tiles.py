"""linear_logprob's product on a GPU, in Triton: a tile of tokens times a tile of the vocabulary, and how tiles are cut.

It compiles for sm_80 and sm_90 and is tested in Triton's interpreter, but it has never run on a GPU. fp32 inputs keep fp32
products (no TF32), which are slow: they are there for checks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tuning(NamedTuple):
    """How a product is cut. Hidden states are read in tiles [tokens,depth], weights in [vocabulary,depth]."""

    tokens: int
    vocabulary: int
    depth: int
    warps: int
    stages: int
    group: int = 16  # token tiles that run side by side, so that a weight tile is read from L2


# (architecture, bytes of an element, few tokens?). On sm_90 a product is a wgmma of 64 tokens a group of four warps;
# 128 accumulators a thread leave room for the epilogue. Consumer chips of sm_86, 89 and 120 have 99 KiB of shared
# memory and take sm_80's.
TUNINGS = {
    (80, 2, False): Tuning(tokens=128, vocabulary=256, depth=64, warps=8, stages=3),
    (80, 2, True): Tuning(tokens=32, vocabulary=128, depth=64, warps=4, stages=4),
    (90, 2, False): Tuning(tokens=128, vocabulary=256, depth=64, warps=8, stages=4),
    (90, 2, True): Tuning(tokens=64, vocabulary=128, depth=64, warps=4, stages=4),
    (80, 4, False): Tuning(tokens=64, vocabulary=64, depth=32, warps=8, stages=3),
    (80, 4, True): Tuning(tokens=16, vocabulary=64, depth=32, warps=4, stages=3),
    (90, 4, False): Tuning(tokens=64, vocabulary=64, depth=32, warps=8, stages=3),
    (90, 4, True): Tuning(tokens=16, vocabulary=64, depth=32, warps=4, stages=3),
}


@triton.jit
def product(
    hidden_tile,
    weight_tile,
    hidden_offsets,
    weight_offsets,
    width,
    hidden_step,
    weight_step,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 [M,N] product of a tile of tokens and one of the vocabulary: 64-bit pointers to their first elements, 32-bit
    offsets [M,K] and [K,N] of their first BLOCK_K channels, to save registers. EVEN: `width` is a multiple of BLOCK_K.
    """
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    channel = tl.arange(0, BLOCK_K)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            a = tl.load(hidden_tile + hidden_offsets)
            b = tl.load(weight_tile + weight_offsets)
        else:
            left = width - start
            a = tl.load(hidden_tile + hidden_offsets, mask=(channel < left)[None, :], other=0.0)
            b = tl.load(weight_tile + weight_offsets, mask=(channel < left)[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
        hidden_tile += BLOCK_K * hidden_step
        weight_tile += BLOCK_K * weight_step
    return sums


@triton.jit
def grouped(program, token_tiles, others, GROUP: tl.constexpr):
    """(token tile, other tile) of a program: groups of GROUP token tiles, in each the other tiles one by one."""
    first = program // (GROUP * others) * GROUP
    size = tl.minimum(token_tiles - first, GROUP)
    inside = program % (GROUP * others)
    return first + inside % size, inside // size


def unsupported(hidden: Tensor) -> str | None:
    """Why the kernels cannot take these inputs (a phrase), or None."""
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernel takes float32, float16 and bfloat16, not {hidden.dtype}"
    if hidden.device.type == "cuda" and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return "the Triton kernel takes GPUs of compute capability 8.0 and above"
    return None


def tuning_for(hidden: Tensor) -> Tuning:
    """The tuning for these hidden states on their device."""
    major = torch.cuda.get_device_capability(hidden.device)[0] if hidden.device.type == "cuda" else 8
    architecture = 90 if major in (9, 10) else 80
    return TUNINGS[architecture, hidden.element_size(), hidden.shape[0] <= 64]


def near(x: Tensor, rows: int, depth: int) -> Tensor:
    """x, copied if need be so that 32-bit offsets reach through a tile [rows,depth] of it."""
    if rows * x.stride(0) + depth * x.stride(1) < 1 << 31:
        return x
    x = x.contiguous()
    if rows * x.shape[1] >= 1 << 31:
        raise ValueError(f"the kernel takes widths below {(1 << 31) // rows}, not {x.shape[1]}")
    return x


def constants(hidden: Tensor, bias: Tensor | None, tuning: Tuning) -> dict[str, Any]:
    """The constants and options that both kernels are launched with."""
    return {
        "BIAS": bias is not None,
        "PRECISION": "ieee",
        "EVEN": hidden.shape[1] % tuning.depth == 0,
        "GROUP": tuning.group,
        "BLOCK_M": tuning.tokens,
        "BLOCK_N": tuning.vocabulary,
        "BLOCK_K": tuning.depth,
        "num_warps": tuning.warps,
        "num_stages": tuning.stages,
        "enable_fp_fusion": True,
    }
