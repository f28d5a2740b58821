"""The head's two passes over rows of logits, on a GPU, in Triton: log-sum-exp with the target's logit, and the gradient.

First pass: a program per (row, split of the vocabulary) reads its logits once, block by block, and keeps the running
maximum (from -inf), the sum of exponentials and, for the entropy, their sum weighted by the distance from the maximum.
A second, tiny kernel merges the splits of each row in their order; `triton_linear_logprob` uses it too. Second pass: an
element-wise kernel. No atomics: a rerun on one device is bitwise equal.

Both are bound by memory: the first reads CV logits, the second reads and writes them. fp32 arithmetic, offsets of rows
in 64 bits. They compile for sm_80 and sm_90 and are tested in Triton's interpreter, but have never run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_BLOCK = 4096  # logits of a row that a program holds at once
WARPS = 8
MERGE_BLOCK = 128  # rows that a program merges
PROGRAMS_PER_PROCESSOR = 4  # wanted before rows are split


@triton.jit
def rebased(top, total, weighted, new_top, scale, ENTROPY: tl.constexpr):
    """Sums of exp2((x - top) scale), and of the same times (x - top), turned into those from `new_top` >= top."""
    shift = top - new_top  # -inf for an empty state
    factor = tl.exp2(shift * scale)
    if ENTROPY:
        weighted = tl.where(factor > 0.0, factor * (weighted + total * shift), 0.0)
    return total * factor, weighted


@triton.jit
def finite_top(top):
    """Where all logits so far are -inf, differences from the maximum would be NaN: from 0 they are -inf."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def logprob_partials(
    logits,  # [C,V]
    targets,  # [C]
    tops,  # [splits,C]
    totals,  # [splits,C]
    weights,  # [splits,C]
    target_logits,  # [C]
    rows,
    vocabulary,
    row_stride,
    span,
    scale,  # log2(e) / temperature
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * span
    last = tl.minimum(first + span, vocabulary)
    source = logits + row * row_stride
    column = tl.arange(0, BLOCK)
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    weighted = tl.zeros([], tl.float32)
    for start in range(first, last, BLOCK):
        there = column < last - start
        x = tl.load(source + start + column, mask=there, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x))
        base = finite_top(new_top)
        total, weighted = rebased(top, total, weighted, base, scale, ENTROPY)
        # Differences first: the maximum's own term is exactly 1, so that no log-prob comes out above 0.
        below = x - base
        share = tl.exp2(below * scale)
        total += tl.sum(share)
        if ENTROPY:
            weighted += tl.sum(tl.where(share > 0.0, share * below, 0.0))
        top = new_top
    at = split.to(tl.int64) * rows + row
    tl.store(tops + at, top)
    tl.store(totals + at, total)
    if ENTROPY:
        tl.store(weights + at, weighted)
    target = tl.load(targets + row)
    mine = (target >= first) & (target < last)
    found = tl.load(source + target, mask=mine, other=0.0).to(tl.float32)
    tl.store(target_logits + row, found, mask=mine)


@triton.jit
def merge_logprobs(
    tops,  # [splits,T]
    totals,  # [splits,T]
    weights,  # [splits,T]
    target_logits,  # [T]
    logprobs,  # [T]
    lse,  # [T]
    entropies,  # [T]
    tokens,
    splits,
    scale,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    at = token
    for _ in range(splits):
        part_top = tl.load(tops + at, mask=there, other=0.0)
        part_total = tl.load(totals + at, mask=there, other=1.0)
        part_weighted = weighted
        if ENTROPY:
            part_weighted = tl.load(weights + at, mask=there, other=0.0)
        new_top = tl.maximum(top, part_top)
        base = finite_top(new_top)
        total, weighted = rebased(top, total, weighted, base, scale, ENTROPY)
        part_total, part_weighted = rebased(part_top, part_total, part_weighted, base, scale, ENTROPY)
        total += part_total
        if ENTROPY:
            weighted += part_weighted
        top = new_top
        at += tokens
    # total >= 1 since it holds the maximum's own 1; an approximate logarithm may still come out below 0.
    log_total = tl.log2(total)
    log_total = tl.where(total >= 1.0, tl.maximum(log_total, 0.0), log_total)
    target_logit = tl.load(target_logits + token, mask=there, other=0.0)
    tl.store(logprobs + token, ((target_logit - top) * scale - log_total) * LN_2, mask=there)
    tl.store(lse + token, (top * scale + log_total) * LN_2, mask=there)
    if ENTROPY:
        tl.store(entropies + token, (log_total - weighted / total * scale) * LN_2, mask=there)


@triton.jit
def logit_gradients(
    logits,  # [C,V]
    targets,  # [C]
    lse,  # [C]
    coefficients,  # [C]
    out,  # [C,V], or logits itself
    vocabulary,
    row_stride,
    out_stride,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < vocabulary
    x = tl.load(logits + row * row_stride + column, mask=there, other=0.0).to(tl.float32)
    share = tl.exp2((x * inverse_temperature - tl.load(lse + row)) * LOG2_E)
    coefficient = tl.load(coefficients + row) * inverse_temperature
    gradient = coefficient * (tl.where(column == tl.load(targets + row), 1.0, 0.0) - share)
    tl.store(out + row * out_stride + column, gradient.to(out.dtype.element_ty), mask=there)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class Partials:
    """What the programs that share a row leave for `merge`: fp32 [splits,T], or [T] for the target's logit.

    12 T (splits + 1) bytes at most. A target that no program meets lies outside the vocabulary: its log-prob is NaN.
    """

    def __init__(self, splits: int, tokens: int, entropy: bool, device: torch.device) -> None:
        self.splits, self.tokens, self.entropy = splits, tokens, entropy
        self.tops = torch.empty(splits, tokens, device=device)
        self.totals = torch.empty_like(self.tops)
        self.weights = torch.empty_like(self.tops) if entropy else self.tops
        self.target_logits = torch.full((tokens,), float("nan"), device=device)

    def merge(self, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs, log-sum-exps and, where asked for, entropies: fp32 [T]. scale: log2(e) / temperature."""
        logprobs, lse = torch.empty_like(self.target_logits), torch.empty_like(self.target_logits)
        entropies = torch.empty_like(lse) if self.entropy else None
        merge_logprobs[(triton.cdiv(self.tokens, MERGE_BLOCK),)](
            self.tops,
            self.totals,
            self.weights,
            self.target_logits,
            logprobs,
            lse,
            lse if entropies is None else entropies,
            self.tokens,
            self.splits,
            scale,
            ENTROPY=self.entropy,
            BLOCK=MERGE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
        return logprobs, lse, entropies


def _block(vocabulary: int) -> int:
    return max(16, min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary)))


def logprob_rows_triton(
    logits: Tensor,  # [C,V]
    targets: Tensor,  # [C]
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch: `logprob_rows` for arguments that it has checked. Log-probs, log-sum-exps, entropies: fp32 [C].

    Rows may lie at any distance; few rows are split along V so that they fill the chip. A target outside the
    vocabulary gives NaN.
    """
    rows, vocabulary = logits.shape
    scale = LOG2_E.value / temperature
    if vocabulary > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    block = _block(vocabulary)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(logits.device), max(rows, 1))
    blocks = triton.cdiv(vocabulary, block)
    per_split = triton.cdiv(blocks, min(wanted, blocks))
    partials = Partials(triton.cdiv(blocks, per_split), rows, entropy, logits.device)
    if rows == 0:
        empty = partials.target_logits
        return empty, empty.clone(), empty.clone() if entropy else None
    logprob_partials[rows, partials.splits](
        logits,
        targets.contiguous(),
        partials.tops,
        partials.totals,
        partials.weights,
        partials.target_logits,
        rows,
        vocabulary,
        logits.stride(0),
        per_split * block,
        scale,
        ENTROPY=entropy,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return partials.merge(scale)


def logit_gradient_rows_triton_(
    logits: Tensor,  # [C,V]
    targets: Tensor,  # [C]
    lse: Tensor,  # [C]
    coefficient: Tensor,  # [C]
    temperature: float,
    out: Tensor | None,  # [C,V]
) -> Tensor:
    """Launch: `logit_gradient_rows_` for arguments that it has checked. Returns what it wrote: out, or logits."""
    into = logits if out is None else out
    rows, vocabulary = logits.shape
    if vocabulary > 1 and (logits.stride(1) != 1 or into.stride(1) != 1):
        raise ValueError("logits and out must have contiguous rows: they are read and written in place")
    if logits.numel() == 0:
        return into
    block = _block(vocabulary)
    logit_gradients[rows, triton.cdiv(vocabulary, block)](
        logits,
        targets.contiguous(),
        lse.contiguous(),
        coefficient.contiguous(),
        into,
        vocabulary,
        logits.stride(0),
        into.stride(0),
        1.0 / temperature,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return into
