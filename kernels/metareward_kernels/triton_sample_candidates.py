"""The candidates of a draw on a GPU, in Triton: keys that order as the logits do, and counts and masses from a key up.

Parts of `triton_sample`'s kernel: they compile for sm_80 and sm_90 and are tested in Triton's interpreter, but have never
run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_key(value):
    """int32 in the order of the float32 values; -0 and 0 are one."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_candidates(logits, values, ids, listed, start, count, BLOCK: tl.constexpr):
    """Logits and token ids of candidates start .. start+BLOCK-1: `listed` says how many are in the list, all or none."""
    index = start + tl.arange(0, BLOCK)
    there = index < count
    in_list = index < listed
    from_list = tl.load(values + index, mask=in_list, other=float("-inf"))
    from_row = tl.load(logits + index, mask=there & (index >= listed), other=float("-inf")).to(tl.float32)
    token = tl.load(ids + index, mask=in_list, other=0)
    return tl.where(in_list, from_list, from_row), tl.where(in_list, token, index), there


@triton.jit
def count_from(logits, values, ids, listed, count, threshold, BLOCK: tl.constexpr):
    """Number of candidates whose key is at least `threshold`."""
    threshold = threshold.to(tl.int32)
    total = tl.zeros([], tl.int32)
    for start in range(0, count, BLOCK):
        value, _, there = load_candidates(logits, values, ids, listed, start, count, BLOCK)
        total += tl.sum((there & (order_key(value) >= threshold)).to(tl.int32))
    return total


@triton.jit
def mass_from(
    logits, values, ids, listed, count, threshold, cut, last_tie, lightest, top, scale, BLOCK: tl.constexpr
):
    """fp64 sum of e^((logit - top) / temperature) over the kept candidates from key `threshold` and mass `lightest` up.

    scale = log2(e) / temperature. Kept are the keys above `cut`, and of those at it the ids up to `last_tie`.
    """
    threshold, cut = threshold.to(tl.int32), cut.to(tl.int32)
    total = tl.zeros([], tl.float64)
    for start in range(0, count, BLOCK):
        value, token, there = load_candidates(logits, values, ids, listed, start, count, BLOCK)
        weight = tl.exp2((value - top) * scale).to(tl.float64)
        key = order_key(value)
        wanted = there & (key >= threshold) & ((key > cut) | ((key == cut) & (token <= last_tie)))
        total += tl.sum(tl.where(wanted & (weight >= lightest), weight, 0.0))
    return total


@triton.jit
def id_of_tie(logits, values, ids, listed, count, cut, number, BLOCK: tl.constexpr):
    """Token id of the `number`-th candidate (from 1, in vocabulary order) whose key is `cut`; the largest id if fewer."""
    cut = cut.to(tl.int32)
    found = tl.full([], 0x7FFFFFFF, tl.int32)
    before = tl.zeros([], tl.int32)
    start = tl.zeros([], tl.int32)
    while (start < count) & (before < number):
        value, token, there = load_candidates(logits, values, ids, listed, start, count, BLOCK)
        tie = (there & (order_key(value) == cut)).to(tl.int32)
        rank = before + tl.cumsum(tie, axis=0)
        found = tl.minimum(found, tl.min(tl.where((tie != 0) & (rank == number), token, 0x7FFFFFFF)))
        before += tl.sum(tie)
        start += BLOCK
    return found
