"""linear_logprob by chunks of tokens: plain PyTorch, and the compiled row passes where they run.

The forward pass keeps one log-sum-exp a token and the backward pass computes the chunk's logits again. Bytes beyond the
inputs and gradients: LOGIT_ROWS rows of logits in fp32 (in the PyTorch path three times that), in the backward pass also
a chunk's gradient in the inputs' dtype, and the fp32 gradient of the weight. fp32 gradients overwrite their logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from metareward_kernels.head_rows import accumulation_dtype, logit_gradient_rows_, logprob_rows
from metareward_kernels.linear_fp32 import linear_fp32

LOGIT_ROWS = 256  # logits at a time: fresh memory costs as much as arithmetic, and so few rows are used again


def _parts(start: int, end: int, step: int) -> Iterator[slice]:
    for first in range(start, end, step):
        yield slice(first, min(first + step, end))


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    logits = linear_fp32(rows, weight, out=out[: rows.shape[0]])
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
    tokens = hidden.shape[0]
    logprobs = torch.empty(tokens, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    lse = torch.empty_like(logprobs)
    entropies = torch.empty_like(logprobs) if entropy else None
    step = max(1, min(chunk_tokens, LOGIT_ROWS, tokens))
    buffer = torch.empty(step, weight.shape[0], dtype=logprobs.dtype, device=hidden.device)
    for part in _parts(0, tokens, step):
        rows = logprob_rows(_logits(hidden[part], weight, bias, buffer), targets[part], temperature, entropy)
        logprobs[part], lse[part] = rows.logprobs, rows.lse
        if entropies is not None:
            assert rows.entropy is not None
            entropies[part] = rows.entropy
    return logprobs, lse, entropies


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
    buffer = hidden.new_empty(chunk, weight.shape[0])
    in_place = hidden.dtype == dtype
    wide = buffer if in_place else buffer.new_empty(min(chunk, LOGIT_ROWS), weight.shape[0], dtype=dtype)
    for part in _parts(0, tokens, chunk or 1):
        rows = hidden[part]
        gradient = buffer[: rows.shape[0]]
        for piece in _parts(part.start, part.stop, LOGIT_ROWS):
            here = gradient[piece.start - part.start : piece.stop - part.start]
            logits = _logits(hidden[piece], weight, bias, here if in_place else wide)
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
