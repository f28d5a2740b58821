"""linear_logprob piece by piece: plain PyTorch, and the compiled row passes where they run.

The forward pass keeps one log-sum-exp a token and the backward pass computes the logits again, a chunk of tokens at a
time. Bytes beyond the inputs and gradients: forward, bf16 inputs on a CPU with AVX-512 BF16 need V / 32 a token of a chunk,
for no logit is stored; else a CPU holds SLAB_TOKENS x SLAB_ENTRIES logits in fp32 (in the PyTorch path three times that),
and another device LOGIT_ROWS rows of them; backward these rows, a chunk's gradient in the inputs' dtype, and the fp32
gradient of the weight. fp32 gradients overwrite their logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from metareward_kernels.fresh_memory import fresh
from metareward_kernels.head_chunk import Head, runs_compiled
from metareward_kernels.head_rows import (
    RowLogprobs,
    accumulation_dtype,
    add_logit_sums_,
    logit_gradient_rows_,
    logprob_rows,
    logprobs_of_sums,
    new_logit_sums,
)
from metareward_kernels.linear_fp32 import linear_fp32

LOGIT_ROWS = 256  # logits at a time: fresh memory costs as much as arithmetic, and so few rows are used again
SLAB_TOKENS = 2048  # logits of the forward pass at a time on a CPU: 16 MB in fp32
SLAB_ENTRIES = 2048


def _parts(start: int, end: int, step: int) -> Iterator[slice]:
    for first in range(start, end, step):
        yield slice(first, min(first + step, end))


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    logits = linear_fp32(rows, weight, out=out)
    return logits if bias is None else logits.add_(bias)


def chunked_logprob(
    hidden: Tensor,  # [T,H]
    weight: Tensor,  # [V,H]
    targets: Tensor,  # [T]
    bias: Tensor | None,  # [V]
    temperature: float,
    chunk_tokens: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs, log-sum-exps and, where asked for, entropies: [T], float32 (float64 for float64 inputs).

    For arguments that `linear_logprob` has checked.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    logprobs = torch.empty(tokens, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    lse = torch.empty_like(logprobs)
    entropies = torch.empty_like(logprobs) if entropy else None
    rows_of: Callable[[Tensor, Tensor], RowLogprobs]
    if runs_compiled(weight):
        step, rows_of = chunk_tokens, Head(weight, bias, temperature, entropy, chunk_tokens).logprobs
    elif hidden.device.type == "cpu":
        step = min(SLAB_TOKENS, chunk_tokens * vocabulary)
        rows_of = partial(_by_vocabulary, weight, bias, temperature, entropy, chunk_tokens)
    else:
        step = min(chunk_tokens, LOGIT_ROWS)
        rows_of = partial(_by_tokens, weight, bias, temperature, entropy)
    for part in _parts(0, tokens, step):
        rows = rows_of(hidden[part], targets[part])
        logprobs[part], lse[part] = rows.logprobs, rows.lse
        if entropies is not None:
            assert rows.entropy is not None
            entropies[part] = rows.entropy
    return logprobs, lse, entropies


def _by_tokens(
    weight: Tensor,  # [V,H]
    bias: Tensor | None,  # [V]
    temperature: float,
    entropy: bool,
    hidden: Tensor,  # [C,H]
    targets: Tensor,  # [C]
) -> RowLogprobs:
    dtype = accumulation_dtype(hidden.dtype)
    buffer = torch.empty(hidden.shape[0], weight.shape[0], dtype=dtype, device=hidden.device)
    return logprob_rows(_logits(hidden, weight, bias, buffer), targets, temperature, entropy)


def _by_vocabulary(
    weight: Tensor,  # [V,H]
    bias: Tensor | None,  # [V]
    temperature: float,
    entropy: bool,
    chunk_tokens: int,
    hidden: Tensor,  # [C,H]
    targets: Tensor,  # [C]
) -> RowLogprobs:
    """Slab by slab of the vocabulary, and sums of each row go on: the slab's logits are read while they are in the cache,
    and the product makes each part of the weight ready once.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    sums = new_logit_sums(rows, hidden.device)
    slab = max(1, min(vocabulary, SLAB_ENTRIES, chunk_tokens * vocabulary // rows))
    buffer = fresh([rows * slab], accumulation_dtype(hidden.dtype), hidden.device)
    for part in _parts(0, vocabulary, slab):
        width = part.stop - part.start
        here = _logits(
            hidden,
            weight[part],
            None if bias is None else bias[part],
            buffer[: rows * width].view(rows, width),
        )
        add_logit_sums_(sums, here, targets, part.start, temperature, entropy)
    return logprobs_of_sums(sums, temperature, entropy, buffer.dtype)


def chunked_logprob_backward(
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
    """Gradients of sum(grad * logprobs) in hidden, weight and bias, where needed; sums over tokens are fp32."""
    tokens, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None
    total = weight.new_zeros(weight.shape, dtype=dtype) if needed[1] else None
    total_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if needed[2] else None
    chunk = min(chunk_tokens, tokens)
    buffer = fresh([chunk, weight.shape[0]], hidden.dtype, hidden.device)
    in_place = hidden.dtype == dtype
    wide = buffer if in_place else buffer.new_empty(min(chunk, LOGIT_ROWS), weight.shape[0], dtype=dtype)
    for part in _parts(0, tokens, chunk or 1):
        rows = hidden[part]
        gradient = buffer[: rows.shape[0]]
        for piece in _parts(part.start, part.stop, LOGIT_ROWS):
            here = gradient[piece.start - part.start : piece.stop - part.start]
            logits = _logits(hidden[piece], weight, bias, here if in_place else wide[: here.shape[0]])
            logit_gradient_rows_(
                logits, targets[piece], lse[piece], grad[piece], temperature, None if in_place else here
            )
        if grad_hidden is not None:
            torch.mm(gradient, weight, out=grad_hidden[part])
        if total is not None and total.dtype == rows.dtype:
            total.addmm_(gradient.T, rows)
        elif total is not None:
            total += gradient.T @ rows
        if total_bias is not None:
            total_bias += gradient.sum(dim=0, dtype=dtype)
    return (
        grad_hidden,
        None if total is None else total.to(weight.dtype),
        None if total_bias is None else total_bias.to(weight.dtype),
    )
