"""The DPO loss on a GPU, in Triton: one launch from token log-probs to losses and slopes, one from slopes to gradients.

Forward, a program a sequence and a program a pair: the pair's sums its two sequences itself, with the code of the sequence's
own program and so to the same bits, which saves a launch between sums and losses. Backward, a program a sequence: it adds up
what the pairs that name it ask for, in the pairs' order, and writes that to its tokens. No atomics: a rerun is bitwise equal.
Sums are fp32 and carry their rounding errors along, so they are as good as fp64 ones rounded once.
Bytes: 12 T forward, 4 T + 24 P S backward (the pairs stay in cache): a few microseconds, bound by the launches.
It compiles for sm_80 and sm_90 and is tested in Triton's interpreter, but it has never run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS = 1024
BLOCK_PAIRS = 256
WARPS = 4


@triton.jit
def add_exactly(left, left_rest, right, right_rest):
    """left + right as the rounded sum and what rounding took (Knuth's two-sum); the rests are added to it."""
    total = left + right
    part = total - left
    rest = (left - (total - part)) + (right - part)
    return total, left_rest + right_rest + rest


@triton.jit
def sequence_bounds(cu_seqlens, sequence, tokens):
    """First token of the sequence and the one past its last, inside [0, tokens] whatever is in cu_seqlens."""
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    return tl.minimum(tl.maximum(begin, 0), tokens), tl.minimum(tl.maximum(end, 0), tokens)


@triton.jit
def sequence_sum(logprobs, cu_seqlens, sequence, tokens, BLOCK: tl.constexpr):
    begin, end = sequence_bounds(cu_seqlens, sequence, tokens)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    rest = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        value = tl.load(logprobs + start + lanes, mask=start + lanes < end, other=0.0)
        total, rest = add_exactly(total, rest, value, 0.0)
    total, rest = tl.reduce((total, rest), 0, add_exactly)
    return tl.where(tl.abs(total) == float("inf"), total, total + rest)  # of an infinity the rest is NaN


@triton.jit
def log1p_small(x):
    """log(1 + x) for x in [0, 1] without losing small x: the rounding of 1 + x is divided out (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def log_sigmoid(x):
    return tl.where(x > 0.0, 0.0, x) - log1p_small(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def loss_and_slope(margin, beta, smoothing, LOSS: tl.constexpr):
    """The loss and its derivative with respect to the margin. Comparisons are such that a NaN stays one."""
    if LOSS == "sigmoid":
        x = beta * margin
        loss = -(1.0 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)
        slope = beta * (smoothing * sigmoid(x) - (1.0 - smoothing) * sigmoid(-x))
    elif LOSS == "ipo":
        distance = margin - 1.0 / (2.0 * beta)
        loss = distance * distance
        slope = 2.0 * distance
    else:
        tl.static_assert(LOSS == "hinge")
        short = 1.0 - beta * margin
        loss = tl.where(short <= 0.0, 0.0, short)
        slope = tl.where(short <= 0.0, 0.0, -beta)
    return loss, slope


@triton.jit(do_not_specialize=["tokens", "sequences"])
def score_pairs(
    logprobs,  # [T] fp32
    cu_seqlens,  # [S+1]
    pairs,  # [P,2]
    reference_logprobs,  # [S] fp32
    losses,  # [P] fp32
    sums,  # [S] fp32
    chosen_rewards,  # [P] fp32
    rejected_rewards,  # [P] fp32
    margins,  # [P] fp32
    slopes,  # [P] fp32
    tokens,
    sequences,
    beta,
    smoothing,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if program < sequences:
        tl.store(sums + program, sequence_sum(logprobs, cu_seqlens, program, tokens, BLOCK))
        return
    pair = program - sequences
    chosen = tl.load(pairs + 2 * pair).to(tl.int64)
    rejected = tl.load(pairs + 2 * pair + 1).to(tl.int64)
    known = (chosen >= 0) & (chosen < sequences) & (rejected >= 0) & (rejected < sequences)
    chosen = tl.where(known, chosen, 0)
    rejected = tl.where(known, rejected, 0)
    chosen_ratio = sequence_sum(logprobs, cu_seqlens, chosen, tokens, BLOCK)
    chosen_ratio -= tl.load(reference_logprobs + chosen)
    rejected_ratio = sequence_sum(logprobs, cu_seqlens, rejected, tokens, BLOCK)
    rejected_ratio -= tl.load(reference_logprobs + rejected)
    chosen_ratio = tl.where(known, chosen_ratio, float("nan"))
    loss, slope = loss_and_slope(chosen_ratio - rejected_ratio, beta, smoothing, LOSS)
    tl.store(losses + pair, loss)
    tl.store(slopes + pair, slope)
    tl.store(chosen_rewards + pair, beta * chosen_ratio)
    tl.store(rejected_rewards + pair, beta * rejected_ratio)
    tl.store(margins + pair, beta * chosen_ratio - beta * rejected_ratio)


@triton.jit(do_not_specialize=["tokens", "pair_count"])
def spread_gradient(
    grad_losses,  # [P] fp32
    grad_sums,  # [S] fp32
    slopes,  # [P] fp32
    cu_seqlens,  # [S+1]
    pairs,  # [P,2]
    gradient,  # [T] fp32
    tokens,
    pair_count,
    BLOCK: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    pulls = tl.zeros([BLOCK_PAIRS], tl.float32)
    for start in range(0, pair_count, BLOCK_PAIRS):
        pair = start + tl.arange(0, BLOCK_PAIRS).to(tl.int64)
        there = pair < pair_count
        chosen = tl.load(pairs + 2 * pair, mask=there, other=-1)
        rejected = tl.load(pairs + 2 * pair + 1, mask=there, other=-1)
        pull = tl.load(grad_losses + pair, mask=there, other=0.0) * tl.load(
            slopes + pair, mask=there, other=0.0
        )
        pulls += tl.where(chosen == sequence, pull, 0.0) - tl.where(rejected == sequence, pull, 0.0)
    coefficient = tl.load(grad_sums + sequence) + tl.sum(pulls)
    begin, end = sequence_bounds(cu_seqlens, sequence, tokens)
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        tl.store(
            gradient + start + lanes, coefficient + tl.zeros([BLOCK], tl.float32), mask=start + lanes < end
        )


def dpo_loss_triton(
    logprobs: Tensor,  # [T]
    cu_seqlens: Tensor,  # [S+1]
    pairs: Tensor,  # [P,2]
    reference_logprobs: Tensor,  # [S]
    beta: float,
    loss: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch: losses [P], sequence log-probs [S], chosen and rejected rewards, margins and d loss / d log ratio [P].

    For arguments that `dpo_loss` has checked. What lies outside is not read: a bound of cu_seqlens is moved into [0, T], and a
    pair that names an unknown sequence has a loss of NaN.
    """
    sequences, count = cu_seqlens.shape[0] - 1, pairs.shape[0]
    losses, chosen_rewards, rejected_rewards, margins, slopes = (
        torch.empty(count, dtype=torch.float32, device=logprobs.device) for _ in range(5)
    )
    sums = torch.empty(sequences, dtype=torch.float32, device=logprobs.device)
    if sequences + count:
        score_pairs[(sequences + count,)](
            logprobs.contiguous(),
            cu_seqlens.contiguous(),
            pairs.contiguous(),
            reference_logprobs.contiguous(),
            losses,
            sums,
            chosen_rewards,
            rejected_rewards,
            margins,
            slopes,
            logprobs.shape[0],
            sequences,
            beta,
            label_smoothing,
            LOSS=loss,
            BLOCK=BLOCK_TOKENS,
            num_warps=WARPS,
        )
    return losses, sums, chosen_rewards, rejected_rewards, margins, slopes


def dpo_loss_backward_triton(
    grad_losses: Tensor,  # [P]
    grad_sums: Tensor,  # [S]
    slopes: Tensor,  # [P]
    cu_seqlens: Tensor,  # [S+1]
    pairs: Tensor,  # [P,2]
    tokens: int,
) -> Tensor:
    """Launch: the gradient of the token log-probs [T], zero for tokens of no sequence."""
    gradient = torch.zeros(tokens, dtype=torch.float32, device=slopes.device)
    sequences = cu_seqlens.shape[0] - 1
    if sequences and tokens:
        spread_gradient[(sequences,)](
            grad_losses.contiguous(),
            grad_sums.contiguous(),
            slopes,
            cu_seqlens.contiguous(),
            pairs.contiguous(),
            gradient,
            tokens,
            pairs.shape[0],
            BLOCK=BLOCK_TOKENS,
            BLOCK_PAIRS=BLOCK_PAIRS,
            num_warps=WARPS,
        )
    return gradient
