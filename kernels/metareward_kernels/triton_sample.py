"""Draw one token a row on a GPU, in Triton: the semantics of sample.py, without a sort and without the host.

A program a row. One read finds the largest logit and the sums of the exponentials. Where top-k, top-p or min-p is on,
a cheap bound on the logit throws most tokens out, a second read collects the rest in vocabulary order, and bisection
on the order-preserving integer of the logit finds the cuts among them exactly; of the logits equal to the cut the lower
ids are kept, counted. Without them the second read is the draw itself. Masses are fp32, all their sums fp64.
Bytes: two reads of the row (2 V elements). When a bound keeps more tokens than the list holds, every turn of the
bisection reads the row instead: slow, and the same result.
It compiles for sm_80 and sm_90 and is tested in Triton's interpreter, but it has never run on a GPU.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from metareward_kernels.triton_sample_candidates import (
    count_from,
    id_of_tie,
    load_candidates,
    mass_from,
    order_key,
    value_of,
)

LARGEST_BLOCK = 4096
LIST_BLOCKS = 4  # the list of candidates holds this many blocks
WARPS = 16

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST_KEY = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=["top_k", "temperature_bits", "top_p_bits", "min_p_bits"])
def sample_rows(
    logits,  # [S,V]
    uniforms,  # [S] fp64
    tokens,  # [S] int64
    logprobs,  # [S] fp32
    kept_logprobs,  # [S] fp32
    list_values,  # [S,capacity] fp32
    list_ids,  # [S,capacity] int32
    row_stride,
    vocabulary,
    top_k,
    temperature_bits,  # of fp64 numbers: a float argument would be rounded to fp32
    top_p_bits,
    min_p_bits,
    GREEDY: tl.constexpr,
    LIMITED: tl.constexpr,
    NUCLEUS: tl.constexpr,
    MIN_P: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    lanes = tl.arange(0, BLOCK)
    temperature = tl.cast(temperature_bits, tl.int64).to(tl.float64, bitcast=True)
    top_p = tl.cast(top_p_bits, tl.int64).to(tl.float64, bitcast=True)
    min_p = tl.cast(min_p_bits, tl.int64).to(tl.float64, bitcast=True)
    # Kept away from 0 and infinity, where a product with an infinite or a zero difference is NaN.
    scale = tl.minimum(tl.maximum(LOG2E / temperature, 1e-37), 1e37).to(tl.float32)

    top = tl.full([], float("-inf"), tl.float32)
    not_numbers = tl.zeros([], tl.int32)
    raw_total = tl.zeros([], tl.float64)  # of e^(logit - top)
    total = tl.zeros([], tl.float64)  # of the same at the temperature
    lane_tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=3):
        value = tl.load(logits + start + lanes, mask=start + lanes < vocabulary, other=float("-inf")).to(
            tl.float32
        )
        nan = value != value
        not_numbers += tl.sum(nan.to(tl.int32))
        value = tl.where(nan, float("-inf"), value)
        new_top = tl.maximum(top, tl.max(value))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        step = (top - base).to(tl.float64)
        raw_total = raw_total * tl.exp(step) + tl.sum(tl.exp2((value - base) * LOG2E).to(tl.float64))
        if not GREEDY:
            total = total * tl.exp(step / temperature) + tl.sum(
                tl.exp2((value - base) * scale).to(tl.float64)
            )
        if LIMITED:
            lane_tops = tl.maximum(lane_tops, value)
        top = new_top
    if (not_numbers > 0) | (top == float("-inf")) | (top == float("inf")):  # no distribution
        tl.store(tokens + row, -1)
        tl.store(logprobs + row, float("nan"))
        tl.store(kept_logprobs + row, float("nan"))
        return

    if GREEDY:
        drawn = tl.full([], 0x7FFFFFFF, tl.int32)
        at = tl.zeros([], tl.int32)
        while (at < vocabulary) & (drawn == 0x7FFFFFFF):
            value = tl.load(logits + at + lanes, mask=at + lanes < vocabulary, other=float("-inf")).to(
                tl.float32
            )
            drawn = tl.min(tl.where(value == top, at + lanes, 0x7FFFFFFF))
            at += BLOCK
        tl.store(tokens + row, drawn.to(tl.int64))
        tl.store(logprobs + row, (-tl.log(raw_total)).to(tl.float32))
        tl.store(kept_logprobs + row, 0.0)
        return

    values = list_values + row * CAPACITY
    ids = list_ids + row * CAPACITY
    count = vocabulary + tl.zeros([], tl.int32)
    listed = tl.zeros([], tl.int32)  # candidates in the list: all, or none where the row itself is read
    cut = tl.full([], LOWEST_KEY, tl.int64)
    last_tie = tl.full([], 0x7FFFFFFF, tl.int32)
    if LIMITED or NUCLEUS or MIN_P:
        # Scalar keys are held in 64 bits: their sums and successors do not wrap.
        top_key = order_key(top).to(tl.int64)
        bound = tl.full([], LOWEST_KEY, tl.int64)
        if LIMITED:
            # The k-th largest of the maxima of disjoint sets of tokens: at least k tokens reach it.
            if top_k <= BLOCK:
                high = top_key
                while bound < high:
                    trial = (bound + high + 1) >> 1
                    enough = tl.sum((order_key(lane_tops) >= trial.to(tl.int32)).to(tl.int32)) >= top_k
                    bound = tl.where(enough, trial, bound)
                    high = tl.where(enough, high, trial - 1)
        else:
            # Tokens lighter than (1 - p) total / V weigh less than (1 - p) total together: the top-p set does without.
            light = min_p
            if NUCLEUS:
                light = tl.maximum(light, (1.0 - top_p) * total / vocabulary)
            low = tl.minimum(top.to(tl.float64), top.to(tl.float64) + temperature * tl.log(light) - 1e-3)
            bound = order_key(low.to(tl.float32)).to(tl.int64) - 1
        count = tl.zeros([], tl.int32)
        for start in tl.range(0, vocabulary, BLOCK, num_stages=3):
            index = start + lanes
            value = tl.load(logits + index, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
            candidate = ((index < vocabulary) & (order_key(value) >= bound.to(tl.int32))).to(tl.int32)
            place = count + tl.cumsum(candidate, axis=0) - 1
            fits = (candidate != 0) & (place < CAPACITY)
            tl.store(values + place, value, mask=fits)
            tl.store(ids + place, index, mask=fits)
            count += tl.sum(candidate)
        tl.debug_barrier()  # the list is read by other threads than wrote it
        listed = tl.where(count <= CAPACITY, count, 0)
        count = tl.where(count <= CAPACITY, count, vocabulary)

        if LIMITED:
            cut = bound
            high = top_key
            while cut < high:
                trial = (cut + high + 1) >> 1
                enough = count_from(logits, values, ids, listed, count, trial, BLOCK) >= top_k
                cut = tl.where(enough, trial, cut)
                high = tl.where(enough, high, trial - 1)
            above = tl.zeros([], tl.int32)
            if cut < top_key:
                above = count_from(logits, values, ids, listed, count, cut + 1, BLOCK)
            last_tie = id_of_tie(logits, values, ids, listed, count, cut, top_k - above, BLOCK)
        if NUCLEUS:
            if LIMITED:
                total = mass_from(
                    logits, values, ids, listed, count, cut, cut, last_tie, 0.0, top, scale, BLOCK
                )
            target = top_p * total
            reached = tl.maximum(bound, cut)
            high = top_key
            while reached < high:
                trial = (reached + high + 1) >> 1
                weight = mass_from(
                    logits, values, ids, listed, count, trial, cut, last_tie, 0.0, top, scale, BLOCK
                )
                reached = tl.where(weight >= target, trial, reached)
                high = tl.where(weight >= target, high, trial - 1)
            above_mass = tl.zeros([], tl.float64)
            if reached < top_key:
                above_mass = mass_from(
                    logits, values, ids, listed, count, reached + 1, cut, last_tie, 0.0, top, scale, BLOCK
                )
            each = tl.exp2((value_of(reached.to(tl.int32)) - top) * scale).to(tl.float64)
            needed = tl.ceil((target - above_mass) / each)
            if (needed >= 1.0) & (needed < 2147483647.0):  # else rounding or a mass of zero: every tie stays
                tie = id_of_tie(logits, values, ids, listed, count, reached, needed.to(tl.int32), BLOCK)
                last_tie = tl.where(reached == cut, tl.minimum(last_tie, tie), tie)
            else:
                last_tie = tl.where(reached == cut, last_tie, 0x7FFFFFFF)
            cut = reached
        total = mass_from(logits, values, ids, listed, count, cut, cut, last_tie, min_p, top, scale, BLOCK)

    cut = cut.to(tl.int32)
    threshold = tl.load(uniforms + row) * total
    before = tl.zeros([], tl.float64)
    at = tl.zeros([], tl.int32)
    drawn = tl.full([], -1, tl.int32)
    open_end = tl.full([], 1, tl.int32)
    while (at < count) & (open_end != 0):
        value, token, there = load_candidates(logits, values, ids, listed, at, count, BLOCK)
        weight = tl.exp2((value - top) * scale).to(tl.float64)
        key = order_key(value)
        kept = there & ((key > cut) | ((key == cut) & (token <= last_tie))) & (weight > 0.0)
        if MIN_P:
            kept = kept & (weight >= min_p)
        weight = tl.where(kept, weight, 0.0)
        cumulative = before + tl.cumsum(weight, axis=0)
        past = tl.min(tl.where(kept & (cumulative > threshold), token, 0x7FFFFFFF))
        last = tl.max(tl.where(kept, token, -1))
        # Where rounding lets no sum exceed the threshold, the last token of positive mass is drawn.
        drawn = tl.where(past != 0x7FFFFFFF, past, tl.maximum(drawn, last))
        open_end = (past == 0x7FFFFFFF).to(tl.int32)
        before += tl.sum(weight)
        at += BLOCK
    drawn_value = tl.load(logits + drawn).to(tl.float32)
    tl.store(tokens + row, drawn.to(tl.int64))
    raw = (drawn_value.to(tl.float64) - top.to(tl.float64)) - tl.log(raw_total)
    tl.store(logprobs + row, tl.minimum(raw, 0.0).to(tl.float32))
    kept_raw = tl.log(tl.exp2((drawn_value - top) * scale).to(tl.float64) / total)
    tl.store(kept_logprobs + row, tl.minimum(kept_raw, 0.0).to(tl.float32))


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def sample_tokens_triton(
    logits: Tensor,  # [S,V]
    uniforms: Tensor,  # [S]
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel: `sample_tokens` for arguments that it has checked.

    Returns (tokens [S] int64, raw log-probs [S] float32, log-probs [S] float32 under the truncated distribution).
    Next to `sample_tokens_torch` the token differs only where rounding decides: masses are fp32 here, fp64 there.
    Holds [S, 16384] candidates (8 bytes each) for as long as it runs.
    """
    rows, vocabulary = logits.shape
    if vocabulary > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    device = logits.device
    tokens = torch.full((rows,), -1, dtype=torch.int64, device=device)
    logprobs = torch.full((rows,), float("nan"), device=device)
    kept_logprobs = logprobs.clone()
    if rows == 0 or vocabulary == 0:
        return tokens, logprobs, kept_logprobs
    block = max(16, min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary)))
    limited, nucleus = 0 < top_k < vocabulary, top_p < 1.0
    capacity = LIST_BLOCKS * block if temperature > 0.0 and (limited or nucleus or min_p > 0.0) else 1
    sample_rows[(rows,)](
        logits,
        uniforms.contiguous(),
        tokens,
        logprobs,
        kept_logprobs,
        torch.empty((rows, capacity), dtype=torch.float32, device=device),
        torch.empty((rows, capacity), dtype=torch.int32, device=device),
        logits.stride(0),
        vocabulary,
        min(top_k, vocabulary),
        _bits(temperature if temperature > 0.0 else 1.0),
        _bits(top_p),
        _bits(min_p),
        GREEDY=temperature == 0.0,
        LIMITED=limited,
        NUCLEUS=nucleus,
        MIN_P=min_p > 0.0,
        CAPACITY=capacity,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return tokens, logprobs, kept_logprobs
