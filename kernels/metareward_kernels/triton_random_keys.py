"""The counter-based uniform numbers of random_keys.py in Triton, bit for bit, so that a draw never waits for the host.

It compiles for sm_80 and sm_90 and is tested in Triton's interpreter, but it has never run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


@triton.jit
def philox_uniforms(keys, positions, uniforms, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = index < count
    key = tl.load(keys + index, mask=there, other=0).to(tl.uint64, bitcast=True)
    position = tl.load(positions + index, mask=there, other=0).to(tl.uint64, bitcast=True)
    # Every word is 32 bits held in 64: the products need them, and every constant then has one type.
    low = tl.full([BLOCK], 0xFFFFFFFF, tl.uint64)
    multiplier0, multiplier1 = (
        tl.full([BLOCK], 0xD2511F53, tl.uint64),
        tl.full([BLOCK], 0xCD9E8D57, tl.uint64),
    )
    step0, step1 = tl.full([BLOCK], 0x9E3779B9, tl.uint64), tl.full([BLOCK], 0xBB67AE85, tl.uint64)
    k0, k1 = key & low, key >> 32
    c0, c1 = position & low, position >> 32
    c2, c3 = tl.zeros([BLOCK], tl.uint64), tl.zeros([BLOCK], tl.uint64)
    for _ in tl.static_range(10):
        p0, p1 = c0 * multiplier0, c2 * multiplier1
        c0, c2 = (p1 >> 32) ^ c1 ^ k0, (p0 >> 32) ^ c3 ^ k1
        c1, c3 = p1 & low, p0 & low
        k0, k1 = (k0 + step0) & low, (k1 + step1) & low
    bits = ((c0 << 21) | (c1 >> 11)).to(tl.int64)  # 53 of them: exact in fp64
    tl.store(uniforms + index, tl.maximum(bits.to(tl.float64), 0.5) * (2.0**-53), mask=there)


def keyed_uniforms_triton(keys: Tensor, positions: Tensor) -> Tensor:
    """`keyed_uniforms` on the device of `keys`: [S] int64, [S] int64 -> [S] float64."""
    keys, positions = keys.contiguous(), positions.contiguous()
    uniforms = torch.empty(keys.shape, dtype=torch.float64, device=keys.device)
    if keys.numel():
        grid = (triton.cdiv(keys.numel(), BLOCK),)
        philox_uniforms[grid](
            keys, positions, uniforms, keys.numel(), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return uniforms
