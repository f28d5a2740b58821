"""Paged attention on a GPU, in Triton: tiles of stacked rows over shared pages, then a merge by log-sum-exp.

First kernel: a program per (tile, key head) holds the queries of the tile's rows, with all query heads of the key
head stacked, and passes once over the tile's pages: each key and value is read once for all of them. It writes the
softmax-weighted values and their log2-sum-exp, fp32, to the partial slots of its entries. Second kernel: a program per
(row, some heads) merges the row's slots in their order. No atomics: a rerun is bitwise equal.

With t tokens in a tile of n rows: 4 t n Hq D FLOP on 2 t Hk D elements of cache, so up to some hundred stacked queries
it is bound by reading the cache. Beyond the cache it moves 8 Hq (D + 1) bytes a slot (written and read once).
It compiles for sm_80 and sm_90 and is tested in Triton's interpreter, but it has never run on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from metareward_kernels import dispatch
from metareward_kernels.attention_tiles import COLUMNS, TileTable, make_tiles

LARGEST_DIM = 128
BLOCK_HEADS = 4  # heads that a program merges
TILES_PER_PROCESSOR = 4  # programs that each multiprocessor gets when segments are split


class Tuning(NamedTuple):
    """How a tile is run. stacked: query vectors of a tile (its entries times the heads of a group)."""

    stacked: int
    tokens: int  # keys a turn
    warps: int
    stages: int


# (bytes of an element, wide tile?, padded channels): no spill, and two programs or more fit a multiprocessor.
# 64 stacked queries are one Hopper warp-group product, 16 the least that mma takes. fp32 has no matrix instructions
# without TF32's rounding: it is there for checks.
TUNINGS = {
    (2, False, 64): Tuning(stacked=16, tokens=64, warps=4, stages=3),
    (2, False, 128): Tuning(stacked=16, tokens=64, warps=4, stages=3),
    (2, True, 64): Tuning(stacked=64, tokens=64, warps=4, stages=3),
    (2, True, 128): Tuning(stacked=64, tokens=32, warps=4, stages=3),
    (4, False, 64): Tuning(stacked=16, tokens=32, warps=8, stages=2),
    (4, False, 128): Tuning(stacked=16, tokens=32, warps=8, stages=2),
    (4, True, 64): Tuning(stacked=32, tokens=32, warps=8, stages=2),
    (4, True, 128): Tuning(stacked=16, tokens=32, warps=8, stages=2),
}


@triton.jit
def attend_tiles(
    query,  # [T,Hq,D]
    key_pages,  # [P,page,Hk,D]
    value_pages,  # [P,page,Hk,D]
    page_ids,
    entry_rows,
    limits,
    tiles,
    entry_slots,
    partial_values,  # [slots,Hq,D] fp32
    partial_lse,  # [slots,Hq] fp32, base 2
    score_scale,  # scale * log2(e)
    query_row_stride,
    query_head_stride,
    key_page_stride,
    key_slot_stride,
    key_head_stride,
    value_page_stride,
    value_slot_stride,
    value_head_stride,
    query_heads,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * COLUMNS
    entries = tl.load(tile + 2)
    if entries == 0:  # padding
        return
    page_start = tl.load(tile)
    first_entry = tl.load(tile + 1)
    token_begin = tl.load(tile + 3)
    token_end = tl.load(tile + 4)
    piece = tl.load(tile + 5)
    kv_head = tl.program_id(1)

    stacked = tl.arange(0, BLOCK_M)
    tokens = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    entry = first_entry + stacked // GROUP
    used = stacked // GROUP < entries
    head = kv_head * GROUP + stacked % GROUP
    row = tl.load(entry_rows + entry, mask=used, other=0).to(tl.int64)
    limit = tl.load(limits + entry, mask=used, other=0)
    q = tl.load(
        query + (row * query_row_stride + head * query_head_stride)[:, None] + dims[None, :],
        mask=used[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(token_begin, token_end, BLOCK_N):
        token = begin + tokens
        there = token < token_end
        page = tl.load(page_ids + page_start + token // PAGE, mask=there, other=0).to(tl.int64)
        slot = token % PAGE
        # What lies past the end is not read at all: it may be NaN, and NaN times a weight of zero is NaN.
        mask = there[:, None] & (dims < DIM)[None, :]
        key_offset = page * key_page_stride + slot * key_slot_stride + kv_head * key_head_stride
        key = tl.load(key_pages + key_offset[:, None] + dims[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * score_scale
        scores = tl.where(token[None, :] < limit[:, None], scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing visible yet: -inf - -inf is NaN
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, axis=1)
        value_offset = page * value_page_stride + slot * value_slot_stride + kv_head * value_head_stride
        value = tl.load(value_pages + value_offset[:, None] + dims[None, :], mask=mask, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        top = new_top

    out = (tl.load(entry_slots + entry, mask=used, other=0) + piece).to(tl.int64) * query_heads + head
    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), top + tl.log2(total))
    tl.store(
        partial_values + (out * DIM)[:, None] + dims[None, :],
        acc,
        mask=used[:, None] & (dims < DIM)[None, :],
    )
    tl.store(partial_lse + out, lse, mask=used)


@triton.jit
def merge_slots(
    partial_values,  # [slots,Hq,D] fp32
    partial_lse,  # [slots,Hq] fp32, base 2
    merge_starts,  # [T+1]
    out,  # [T,Hq,D]
    query_heads,
    DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    mask = (heads < query_heads)[:, None] & (dims < DIM)[None, :]
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for slot in range(tl.load(merge_starts + row), tl.load(merge_starts + row + 1)):
        at = tl.cast(slot, tl.int64) * query_heads + heads
        lse = tl.load(partial_lse + at, mask=heads < query_heads, other=float("-inf"))
        part = tl.load(partial_values + (at * DIM)[:, None] + dims[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, lse)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(lse - base)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + part * weight[:, None]
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = tl.cast(row, tl.int64) * query_heads + heads
    tl.store(out + (at * DIM)[:, None] + dims[None, :], acc.to(out.dtype.element_ty), mask=mask)


def _tuning(dtype: torch.dtype, wide: bool, dim: int, group: int) -> Tuning:
    tuning = TUNINGS[dtype.itemsize, wide, 64 if dim <= 64 else 128]
    return tuning._replace(stacked=max(tuning.stacked, triton.next_power_of_2(group)))


def block_rows(dtype: torch.dtype, query_heads: int, kv_heads: int, dim: int) -> tuple[int, int]:
    """Entries of a narrow and of a wide tile, for `make_tiles`."""
    group = query_heads // kv_heads
    narrow, wide = (_tuning(dtype, is_wide, dim, group).stacked // group for is_wide in (False, True))
    return narrow, wide


def target_tiles(device: torch.device, kv_heads: int) -> int:
    """Tiles that fill `device`, for `make_tiles`: each is run once for every key head."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    )
    return max(1, TILES_PER_PROCESSOR * processors // kv_heads)


def tiles_of(query: Tensor, key_pages: Tensor, segments: Any) -> TileTable:
    """The tiles of `segments` on their device. Waits for the device: for a loop, call `make_tiles` on host arrays."""
    host = [
        getattr(segments, name).cpu().numpy()
        for name in ("page_starts", "lengths", "rows", "row_starts", "limits")
    ]
    table = make_tiles(
        *host,
        query_rows=query.shape[0],
        block_rows=block_rows(query.dtype, query.shape[1], *key_pages.shape[2:]),
        target_tiles=target_tiles(query.device, key_pages.shape[2]),
    )
    return table.to(query.device)


def unsupported(dtype: torch.dtype, dim: int) -> str | None:
    """Why the kernels cannot take queries of this dtype and of heads of `dim` channels (a phrase), or None."""
    if dim > LARGEST_DIM:
        return f"the Triton kernel takes heads of at most {LARGEST_DIM} channels, not {dim}"
    return dispatch.unsupported_dtype("triton", dtype)


def paged_attention_triton(
    query: Tensor,  # [T,Hq,D]
    key_pages: Tensor,  # [P,page,Hk,D]
    value_pages: Tensor,  # [P,page,Hk,D]
    segments: Any,  # Segments
    scale: float,
    tiles: TileTable | None = None,
) -> Tensor:
    """Launch both kernels: `paged_attention` for arguments that it has checked. Returns [T,Hq,D].

    tiles: the table of this step on the query's device, made once for all layers; None makes it from the segments,
    which waits for the device. Its block_rows must come from `block_rows` for this dtype and these heads.
    Raises ValueError for what `unsupported` names.
    """
    reason = unsupported(query.dtype, query.shape[2])
    if reason is not None:
        raise ValueError(f"{reason}; set METAREWARD_KERNELS=torch")
    rows, query_heads, dim = query.shape
    page, kv_heads = key_pages.shape[1:3]
    if query.stride(2) != 1:
        query = query.contiguous()
    if tiles is None:
        tiles = tiles_of(query, key_pages, segments)
    out = torch.empty((rows, query_heads, dim), dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    values = torch.empty((tiles.slots, query_heads, dim), dtype=torch.float32, device=query.device)
    lse = torch.empty((tiles.slots, query_heads), dtype=torch.float32, device=query.device)
    block_d = max(16, triton.next_power_of_2(dim))
    for is_wide, table in ((True, tiles.wide), (False, tiles.narrow)):
        if len(table) == 0:
            continue
        tuning = _tuning(query.dtype, is_wide, dim, query_heads // kv_heads)
        attend_tiles[len(table), kv_heads](
            query,
            key_pages,
            value_pages,
            segments.page_ids,
            segments.rows,
            segments.limits,
            table,
            tiles.entry_slots,
            values,
            lse,
            scale * 1.4426950408889634,
            *query.stride()[:2],
            *key_pages.stride()[:3],
            *value_pages.stride()[:3],
            query_heads,
            PAGE=page,
            GROUP=query_heads // kv_heads,
            DIM=dim,
            COLUMNS=COLUMNS,
            BLOCK_M=tuning.stacked,
            BLOCK_N=tuning.tokens,
            BLOCK_D=block_d,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            enable_fp_fusion=True,
        )
    block_h = min(BLOCK_HEADS, triton.next_power_of_2(query_heads))
    merge_slots[rows, triton.cdiv(query_heads, block_h)](
        values,
        lse,
        tiles.merge_starts,
        out,
        query_heads,
        DIM=dim,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return out
