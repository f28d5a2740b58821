"""The fused row ops of inference on a GPU, in Triton: add_rms_norm, rotate_and_store, silu_mul.

All three are bound by memory: every element is read once and written once. Arithmetic is fp32, rounded once a result.
They compile for sm_80 and sm_90 and are tested in Triton's interpreter, but they have never run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_HEADS = 4
BLOCK_CHANNELS = 1024


@triton.jit
def add_rms_norm_rows(
    residual,
    delta,
    weight,
    out,
    residual_stride,
    delta_stride,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    there = channel < width
    at = residual + row * residual_stride + channel
    x = tl.load(at, mask=there, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta + row * delta_stride + channel, mask=there, other=0.0).to(tl.float32)
        rounded = x.to(residual.dtype.element_ty)
        tl.store(at, rounded, mask=there)
        x = rounded.to(tl.float32)  # the norm of what is stored, as a later layer sees it
    w = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / width + eps) * w
    tl.store(out + row * width + channel, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def normed(low, high, weight, eps, half_channel, there, HALF: tl.constexpr):
    """RMS norm over the channels of each head, given as two halves [heads, HALF]."""
    scale = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF) + eps)
    weight_low = tl.load(weight + half_channel, mask=there, other=0.0).to(tl.float32)
    weight_high = tl.load(weight + HALF + half_channel, mask=there, other=0.0).to(tl.float32)
    return low * scale[:, None] * weight_low[None, :], high * scale[:, None] * weight_high[None, :]


@triton.jit
def rotate_and_store_rows(
    qkv,  # [T,(Hq+2Hk)*D]
    cos,  # [T,1,D]
    sin,  # [T,1,D], its first half negated
    slots,  # [T]
    query,  # [T,Hq,D]
    key_pages,
    value_pages,
    q_norm_weight,
    k_norm_weight,
    eps,
    qkv_stride,
    key_page_stride,
    key_slot_stride,
    key_head_stride,
    value_page_stride,
    value_slot_stride,
    value_head_stride,
    query_heads,
    kv_heads,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    channel = tl.arange(0, BLOCK_HALF)
    inside = channel < HALF
    there = (head < query_heads + 2 * kv_heads)[:, None] & inside[None, :]
    source = qkv + row * qkv_stride + (head * (2 * HALF))[:, None] + channel[None, :]
    low = tl.load(source, mask=there, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=there, other=0.0).to(tl.float32)
    is_query = head < query_heads
    is_value = head >= query_heads + kv_heads
    q_low, q_high = low, high
    if NORM_Q:
        normed_low, normed_high = normed(low, high, q_norm_weight, eps, channel, inside, HALF)
        q_low = tl.where(is_query[:, None], normed_low, q_low)
        q_high = tl.where(is_query[:, None], normed_high, q_high)
    if NORM_K:
        normed_low, normed_high = normed(low, high, k_norm_weight, eps, channel, inside, HALF)
        q_low = tl.where(is_query[:, None], q_low, normed_low)
        q_high = tl.where(is_query[:, None], q_high, normed_high)
    angles = row * (2 * HALF) + channel
    cos_low = tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + angles + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + angles + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    turned_low = (q_low * cos_low + q_high * sin_low).to(query.dtype.element_ty)
    turned_high = (q_high * cos_high + q_low * sin_high).to(query.dtype.element_ty)

    to_query = query + ((row * query_heads + head) * (2 * HALF))[:, None] + channel[None, :]
    tl.store(to_query, turned_low, mask=there & is_query[:, None])
    tl.store(to_query + HALF, turned_high, mask=there & is_query[:, None])

    slot = tl.load(slots + row)
    heads_to_store = tl.where(
        slot >= 0, query_heads + 2 * kv_heads, 0
    )  # rows that only fill a graph have no slot
    stored = (head < heads_to_store)[:, None] & inside[None, :]
    page = slot // PAGE
    offset = slot % PAGE
    key_head = (head - query_heads).to(tl.int64)
    to_key = key_pages + page * key_page_stride + offset * key_slot_stride
    to_key = to_key + (key_head * key_head_stride)[:, None] + channel[None, :]
    is_key = stored & (head >= query_heads)[:, None] & (head < query_heads + kv_heads)[:, None]
    tl.store(to_key, turned_low, mask=is_key)
    tl.store(to_key + HALF, turned_high, mask=is_key)
    value_head = (head - query_heads - kv_heads).to(tl.int64)
    to_value = value_pages + page * value_page_stride + offset * value_slot_stride
    to_value = to_value + (value_head * value_head_stride)[:, None] + channel[None, :]
    tl.store(to_value, low.to(query.dtype.element_ty), mask=stored & is_value[:, None])
    tl.store(to_value + HALF, high.to(query.dtype.element_ty), mask=stored & is_value[:, None])


@triton.jit
def silu_mul_rows(gate_up, out, row_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = channel < width
    gate = tl.load(gate_up + row * row_stride + channel, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + channel, mask=there, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + channel, y.to(out.dtype.element_ty), mask=there)


def add_rms_norm_triton(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Launch: `add_rms_norm` for arguments that it has checked. [T,H] (updated in place), [T,H] | None, [H] -> [T,H].

    The result has the weight's dtype; the residual may be wider.
    """
    rows, width = residual.shape
    out = torch.empty((rows, width), dtype=weight.dtype, device=residual.device)
    if out.numel() == 0:
        return out
    assert residual.stride(1) == 1, residual.stride()
    if delta is not None and delta.stride(1) != 1:
        delta = delta.contiguous()
    block = triton.next_power_of_2(width)
    add_rms_norm_rows[(rows,)](
        residual,
        residual if delta is None else delta,
        weight.contiguous(),
        out,
        residual.stride(0),
        0 if delta is None else delta.stride(0),
        width,
        eps,
        ADD=delta is not None,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
        enable_fp_fusion=True,
    )
    return out


def rotate_and_store_triton(
    qkv: Tensor,  # [T,(Hq+2Hk)*D]
    cos: Tensor,  # [T,1,D]
    sin: Tensor,  # [T,1,D]
    slots: Tensor,  # [T] int64
    key_pages: Tensor,  # [P,page,Hk,D]
    value_pages: Tensor,  # [P,page,Hk,D]
    q_norm_weight: Tensor | None = None,  # [D]
    k_norm_weight: Tensor | None = None,  # [D]
    eps: float = 1e-6,
) -> Tensor:
    """Launch: `rotate_and_store` for arguments that it has checked. Returns the rotated queries [T,Hq,D].

    A row whose slot is negative stores nothing: such rows fill a captured graph.
    """
    page, kv_heads, dim = key_pages.shape[1:]
    heads = qkv.shape[1] // dim
    query_heads = heads - 2 * kv_heads
    query = torch.empty((qkv.shape[0], query_heads, dim), dtype=qkv.dtype, device=qkv.device)
    if len(qkv) == 0:
        return query
    if qkv.stride(1) != 1:
        qkv = qkv.contiguous()
    rotate_and_store_rows[len(qkv), triton.cdiv(heads, BLOCK_HEADS)](
        qkv,
        cos.contiguous(),
        sin.contiguous(),
        slots.contiguous(),
        query,
        key_pages,
        value_pages,
        qkv if q_norm_weight is None else q_norm_weight.contiguous(),
        qkv if k_norm_weight is None else k_norm_weight.contiguous(),
        eps,
        qkv.stride(0),
        *key_pages.stride()[:3],
        *value_pages.stride()[:3],
        query_heads,
        kv_heads,
        PAGE=page,
        HALF=dim // 2,
        NORM_Q=q_norm_weight is not None,
        NORM_K=k_norm_weight is not None,
        BLOCK_HEADS=BLOCK_HEADS,
        BLOCK_HALF=triton.next_power_of_2(dim // 2),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return query


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """Launch: `silu_mul` for an argument that it has checked. [T,2I] -> [T,I]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    block = min(BLOCK_CHANNELS, triton.next_power_of_2(width))
    silu_mul_rows[rows, triton.cdiv(width, block)](
        gate_up,
        out,
        gate_up.stride(0),
        width,
        BLOCK=block,
        num_warps=max(1, block // 256),
        enable_fp_fusion=True,
    )
    return out
