"""linear_logprob on a GPU, in Triton: products with the softmax's passes in their epilogues; logits are never stored.

Forward: a program per (tile of tokens, tile of the vocabulary) leaves each token's maximum, sum of exponentials and, for
the entropy, weighted sum, and picks the target's logit out of the same tile. The partials [tiles,T] are merged in their
order. Neighbouring programs share token tiles and weight tiles in L2. (Several tiles a program would need fewer partials,
but the state carried from tile to tile does not fit the registers beside 128 accumulators a thread.)
Backward: the vocabulary goes by in slabs. A kernel makes the logits of all tokens again and writes their gradient
[T,slab] in the inputs' dtype, the target's column formed in fp32; cuBLAS multiplies it with the weight's slab, added up
in fp32, and with the hidden states: each row of the weight's gradient is one product over all tokens.
No atomics: a rerun on one device is bitwise equal.

FLOP: 2THV forward; 6THV backward, 4THV with one input frozen. Memory beyond inputs and gradients: forward 8 bytes a token
and tile (12 with the entropy), 1/64 of bf16 logits with tiles of 256; backward the slab, at most chunk_tokens * V
numbers, and fp32 [T,H].
Bound by the products. It compiles for sm_80 and sm_90 and is tested in Triton's interpreter, but it has never run on a
GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metareward_kernels.triton_head_rows import LOG2_E, Partials, finite_top
from metareward_kernels.triton_head_tiles import constants, grouped, near, product, tuning_for


@triton.jit
def logprob_tiles(
    hidden,  # [T,H]
    weight,  # [V,H]
    bias,  # [V]
    targets,  # [T]
    tops,  # [tiles,T]
    totals,  # [tiles,T]
    weights,  # [tiles,T]
    target_logits,  # [T]
    tokens,
    vocabulary,
    width,
    hidden_row,
    hidden_step,
    weight_row,
    weight_step,
    scale,  # log2(e) / temperature
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(vocabulary, BLOCK_N)
    token_tile, tile = grouped(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tiles, GROUP)
    # Rows past the end read the last one again: no mask in the product's loop. Nothing of them is stored.
    first_token, start = token_tile * BLOCK_M, tile * BLOCK_N
    token, entry = first_token + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    row, column = tl.minimum(token, tokens - 1), tl.minimum(entry, vocabulary - 1)
    channel = tl.arange(0, BLOCK_K)
    logit = product(
        hidden + first_token.to(tl.int64) * hidden_row,
        weight + start.to(tl.int64) * weight_row,
        ((row - first_token) * hidden_row)[:, None] + (channel * hidden_step)[None, :],
        ((column - start) * weight_row)[None, :] + (channel * weight_step)[:, None],
        width,
        hidden_step,
        weight_step,
        PRECISION,
        EVEN,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if BIAS:
        logit += tl.load(bias + column).to(tl.float32)[None, :]
    logit = tl.where((entry < vocabulary)[None, :], logit, -float("inf"))
    there = token < tokens
    target = tl.load(targets + row)
    here = there & (target >= start) & (target < tl.minimum(start + BLOCK_N, vocabulary))
    hit = tl.arange(0, BLOCK_N)[None, :] == tl.where(here, target - start, -1).to(tl.int32)[:, None]
    tl.store(target_logits + row, tl.sum(tl.where(hit, logit, 0.0), axis=1), mask=here)
    # Differences first: the maximum's own term is exactly 1, so that no log-prob comes out above 0.
    top = tl.max(logit, axis=1)
    below = logit - finite_top(top)[:, None]
    share = tl.exp2(below * scale)
    at = tile.to(tl.int64) * tokens + row
    tl.store(tops + at, top, mask=there)
    tl.store(totals + at, tl.sum(share, axis=1), mask=there)
    if ENTROPY:
        # The guard is on the difference: on the share it takes more registers, and triton 3.6 spills them on sm_80.
        weighted = share * tl.where(below > -float("inf"), below, 0.0)
        tl.store(weights + at, tl.sum(weighted, axis=1), mask=there)


@triton.jit
def gradient_tiles(
    hidden,  # [T,H]
    weight,  # [V,H]
    bias,  # [V]
    targets,  # [T]
    lse,  # [T]
    coefficients,  # [T]
    out,  # [T,slab]
    tokens,
    slab_start,
    slab_end,
    width,
    hidden_row,
    hidden_step,
    weight_row,
    weight_step,
    out_row,
    inverse_temperature,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    slab_tiles = tl.cdiv(slab_end - slab_start, BLOCK_N)
    token_tile, tile = grouped(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), slab_tiles, GROUP)
    first_token, start = token_tile * BLOCK_M, slab_start + tile * BLOCK_N
    token, entry = first_token + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    row, column = tl.minimum(token, tokens - 1), tl.minimum(entry, slab_end - 1)
    channel = tl.arange(0, BLOCK_K)
    logit = product(
        hidden + first_token.to(tl.int64) * hidden_row,
        weight + start.to(tl.int64) * weight_row,
        ((row - first_token) * hidden_row)[:, None] + (channel * hidden_step)[None, :],
        ((column - start) * weight_row)[None, :] + (channel * weight_step)[:, None],
        width,
        hidden_step,
        weight_step,
        PRECISION,
        EVEN,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if BIAS:
        logit += tl.load(bias + column).to(tl.float32)[None, :]
    share = tl.exp2((logit * inverse_temperature - tl.load(lse + row)[:, None]) * LOG2_E)
    coefficient = tl.load(coefficients + row) * inverse_temperature
    target = tl.load(targets + row)
    target = tl.where((target >= start) & (target < slab_end), target, -1).to(tl.int32)
    hit = entry[None, :] == target[:, None]
    gradient = coefficient[:, None] * (tl.where(hit, 1.0, 0.0) - share)
    there = (token < tokens)[:, None] & (entry < slab_end)[None, :]
    out_tile = out + first_token.to(tl.int64) * out_row + tile * BLOCK_N
    offsets = (tl.arange(0, BLOCK_M) * out_row)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_tile + offsets, gradient.to(out.dtype.element_ty), mask=there)


def linear_logprob_triton(
    hidden: Tensor,  # [T,H]
    weight: Tensor,  # [V,H]
    targets: Tensor,  # [T]
    bias: Tensor | None,  # [V]
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch: `linear_logprob` for arguments that it has checked. Log-probs, log-sum-exps, entropies: fp32 [T].

    Any strides. A target outside the vocabulary gives NaN.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    scale = LOG2_E.value / temperature
    tuning = tuning_for(hidden)
    token_tiles, tiles = triton.cdiv(tokens, tuning.tokens), triton.cdiv(vocabulary, tuning.vocabulary)
    hidden, weight = (
        near(hidden, tuning.tokens, tuning.depth),
        near(weight, tuning.vocabulary, tuning.depth),
    )
    partials = Partials(tiles, tokens, entropy, hidden.device)
    if tokens == 0:
        empty = partials.target_logits
        return empty, empty.clone(), empty.clone() if entropy else None
    logprob_tiles[(token_tiles * tiles,)](
        hidden,
        weight,
        weight if bias is None else bias.contiguous(),
        targets.contiguous(),
        partials.tops,
        partials.totals,
        partials.weights,
        partials.target_logits,
        tokens,
        vocabulary,
        hidden.shape[1],
        *hidden.stride(),
        *weight.stride(),
        scale,
        ENTROPY=entropy,
        **constants(hidden, bias, tuning),
    )
    return partials.merge(scale)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (= or +=) a @ b, in total's fp32 whatever the inputs' dtype."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # the interpreter
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def linear_logprob_backward_triton(
    grad: Tensor,  # [T]
    hidden: Tensor,  # [T,H]
    weight: Tensor,  # [V,H]
    targets: Tensor,  # [T]
    bias: Tensor | None,  # [V]
    lse: Tensor,  # [T]
    temperature: float,
    chunk_tokens: int,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum(grad * logprobs) in hidden, weight and bias, where needed. FLOP: 2THV, and 2THV for each of
    the first two. Holds one slab [T,min(V, chunk_tokens V / T)] of gradients in the inputs' dtype.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    tuning = tuning_for(hidden)
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if needed[0] else None
    grad_weight = weight.new_zeros(weight.shape) if needed[1] else None
    grad_bias = weight.new_zeros(vocabulary) if needed[2] else None
    if tokens == 0 or not any(needed):
        return grad_hidden, grad_weight, grad_bias
    hidden, weight = (
        near(hidden, tuning.tokens, tuning.depth),
        near(weight, tuning.vocabulary, tuning.depth),
    )
    # Whole tiles, at least one: rows of the slab stay aligned for the products.
    slab = max(1, chunk_tokens * vocabulary // tokens // tuning.vocabulary) * tuning.vocabulary
    slab = min(slab, triton.cdiv(vocabulary, 8) * 8)
    buffer = torch.empty(tokens, slab, dtype=hidden.dtype, device=hidden.device)
    targets, lse, grad = targets.contiguous(), lse.contiguous(), grad.contiguous()
    for start in range(0, vocabulary, slab):
        end = min(start + slab, vocabulary)
        gradient = buffer[:, : end - start]
        tiles = triton.cdiv(tokens, tuning.tokens) * triton.cdiv(end - start, tuning.vocabulary)
        gradient_tiles[(tiles,)](
            hidden,
            weight,
            weight if bias is None else bias.contiguous(),
            targets,
            lse,
            grad,
            gradient,
            tokens,
            start,
            end,
            hidden.shape[1],
            *hidden.stride(),
            *weight.stride(),
            gradient.stride(0),
            1.0 / temperature,
            **constants(hidden, bias, tuning),
        )
        if grad_hidden is not None:
            _add_product(grad_hidden, gradient, weight[start:end], first=start == 0)
        if grad_weight is not None:
            torch.mm(gradient.T, hidden, out=grad_weight[start:end])
        if grad_bias is not None:
            grad_bias[start:end] = gradient.sum(dim=0, dtype=torch.float32)
    return grad_hidden if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias
