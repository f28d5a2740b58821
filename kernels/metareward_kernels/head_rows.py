"""The passes over rows of logits that every head op is made of: log-probs, and the gradient of log-probs.

They are memory-bound: `logprob_rows` reads the logits, `add_logit_sums_` a part of the vocabulary at a time,
`logit_gradient_rows_` reads and writes them, in place. All take logits that already hold the bias and divide them by the
temperature. Not differentiable: the ops on top of them are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metareward_kernels import cuda_head_rows, dispatch

PLAIN_ROWS = 16  # of logits at a time in plain PyTorch


class RowLogprobs(NamedTuple):
    logprobs: Tensor  # [C] log softmax(logits / temperature) at the target, at most 0
    lse: Tensor  # [C] log-sum-exp of logits / temperature
    entropy: Tensor | None  # [C] entropy in nats of the row's distribution, where it was asked for


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _implementation(logits: Tensor) -> str:
    return dispatch.implementation(
        "head_rows", logits.device.type, lambda which: dispatch.unsupported_dtype(which, logits.dtype)
    )


def logprob_rows(
    logits: Tensor,  # [C,V]
    targets: Tensor,  # [C]
    temperature: float = 1.0,
    entropy: bool = False,
) -> RowLogprobs:
    """Log-prob of each row's target, and the row's log-sum-exp.

    logits [C,V] contiguous float32, bfloat16 or (torch, triton) float16 and float64; targets [C] int64 in [0, V).
    Returns float32 (float64 for float64). Both terms of a log-prob come from the same logits, so none is above 0.
    """
    which = _implementation(logits)
    if which == "triton":
        from metareward_kernels.triton_head_rows import logprob_rows_triton

        return RowLogprobs(*logprob_rows_triton(logits, targets, temperature, entropy))
    if which == "cuda":
        return RowLogprobs(*cuda_head_rows.logprob_rows(logits, targets, temperature, entropy))
    if which == "cpp":
        if entropy:
            return RowLogprobs(
                *torch.ops.metareward.logprob_entropy_rows_cpp(logits, targets.contiguous(), temperature)
            )
        logprobs, lse = torch.ops.metareward.logprob_rows_cpp(logits, targets.contiguous(), temperature)
        return RowLogprobs(logprobs, lse, None)
    scaled = logits.to(accumulation_dtype(logits.dtype)) / temperature
    top = scaled.amax(dim=1, keepdim=True)
    shifted = scaled.sub_(top)
    at_target = shifted.gather(1, targets[:, None]).squeeze(1)
    log_sum = shifted.exp().sum(dim=1).log_()
    lse = top.squeeze(1) + log_sum
    return RowLogprobs(at_target - log_sum, lse, _entropy(logits, lse, temperature) if entropy else None)


def _entropy(logits: Tensor, lse: Tensor, temperature: float) -> Tensor:
    logprobs = (logits.to(lse.dtype) / temperature).sub_(lse[:, None])
    return -(logprobs.exp().mul_(logprobs.nan_to_num_(neginf=0.0))).sum(dim=1)


def new_logit_sums(rows: int, device: torch.device) -> Tensor:
    """[4,C] float64, of a vocabulary of which nothing is known yet: see `add_logit_sums_`."""
    start = torch.tensor([-math.inf, 0.0, 0.0, math.nan], dtype=torch.float64, device=device)
    return start[:, None].expand(4, rows).clone()


def add_logit_sums_(
    sums: Tensor,  # [4,C]
    logits: Tensor,  # [C,W]
    targets: Tensor,  # [C]
    first: int,
    temperature: float = 1.0,
    entropy: bool = False,
) -> None:
    """Adds the part of the vocabulary that begins at `first`, for logits that are never there all at once.

    sums: each row's largest logit so far; the sum of e^((z - largest) / temperature); that sum weighted by
    (z - largest) / temperature, with `entropy`; the target's logit, once its part has come. targets [C] int64 count from
    the vocabulary's beginning. logits contiguous, as in `logprob_rows`, on the CPU.
    """
    if _implementation(logits) == "cpp":
        torch.ops.metareward.add_logit_sums_cpp_(
            logits, targets.contiguous(), first, temperature, entropy, sums
        )
        return
    top, total, weighted, at_target = sums
    inside = (targets >= first) & (targets < first + logits.shape[1])
    found = logits.gather(1, (targets - first).clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    at_target.copy_(torch.where(inside, found.double(), at_target))
    largest = torch.maximum(top, logits.amax(dim=1).double())
    base = largest.masked_fill(largest == -math.inf, 0.0)  # -inf - -inf is NaN
    shifted = (
        logits.to(accumulation_dtype(logits.dtype)).sub(base[:, None].to(logits.dtype)).div_(temperature)
    )
    terms = shifted.exp()
    # Times a sum of 0 the least difference is 0, where minus infinity would not be.
    moved = ((top - base) / temperature).clamp_min(-1e30)
    weighted.add_(moved * total).mul_(moved.exp())
    total.mul_(moved.exp()).add_(terms.sum(dim=1))
    if entropy:
        weighted.add_(terms.mul_(shifted.clamp_min_(-1e30)).sum(dim=1))
    top.copy_(largest)


def logprobs_of_sums(
    sums: Tensor,  # [4,C]
    temperature: float,
    entropy: bool,
    dtype: torch.dtype,
) -> RowLogprobs:
    """What `logprob_rows` returns, in `dtype`, once the whole vocabulary is in the sums."""
    top, total, weighted, at_target = sums
    log_sum = total.log()  # of at least 1: the largest logit's term is exactly 1
    return RowLogprobs(
        ((at_target - top) / temperature - log_sum).to(dtype),
        (top / temperature + log_sum).to(dtype),
        (log_sum - weighted / total).to(dtype) if entropy else None,
    )


def softmax_residual_rows_(
    logits: Tensor,  # [C,V]
    targets: Tensor,  # [C]
    temperature: float = 1.0,
    entropy: bool = False,
    out: Tensor | None = None,  # [C,V]
    scale: float = 1.0,
) -> RowLogprobs:
    """`logprob_rows`, and scale (onehot - softmax(logits / temperature)) over the logits, or in `out`.

    logits, targets and out as in `logit_gradient_rows_`; logits are lost even where `out` is given. Compiled, with a
    scale of 1, it reads the logits once: the later passes find the row in the cache.
    """
    which = _implementation(logits)
    if which == "cuda":
        return RowLogprobs(
            *cuda_head_rows.softmax_residual_rows_(logits, targets, temperature, entropy, out, scale)
        )
    if which == "cpp" and scale == 1.0 and (out is None or out.dtype == torch.bfloat16):
        logprobs, lse, found = torch.ops.metareward.softmax_residual_rows_cpp_(
            logits, targets.contiguous(), temperature, entropy, out
        )
        return RowLogprobs(logprobs, lse, found if entropy else None)
    # A few rows at a time where PyTorch's temporary copies of them would be as large as the logits, thrice.
    step = PLAIN_ROWS if which == "torch" else max(1, logits.shape[0])
    # The results are there before the temporaries: small blocks kept between large ones would break up the heap.
    whole = torch.empty(3, logits.shape[0], dtype=accumulation_dtype(logits.dtype), device=logits.device)
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        rows = logprob_rows(logits[part], targets[part], temperature, entropy)
        whole[0, part], whole[1, part] = rows.logprobs, rows.lse
        if rows.entropy is not None:
            whole[2, part] = rows.entropy
        coefficient = torch.full_like(rows.lse, scale * temperature)
        into = None if out is None else out[part]
        logit_gradient_rows_(logits[part], targets[part], rows.lse, coefficient, temperature, into)
    return RowLogprobs(whole[0], whole[1], whole[2] if entropy else None)


def logit_gradient_rows_(
    logits: Tensor,  # [C,V]
    targets: Tensor,  # [C]
    lse: Tensor,  # [C]
    coefficient: Tensor,  # [C]
    temperature: float = 1.0,
    out: Tensor | None = None,  # [C,V]
) -> Tensor:
    """Gradient of sum(coefficient * logprobs) with respect to logits: coefficient (onehot - p) / temperature.

    logits as in `logprob_rows`, overwritten unless `out` [C,V] is given (bfloat16 or float16, for float32 logits);
    lse and coefficient [C] float32 (float64 for float64). The target's column is formed in fp32 before it is rounded.
    Returns the tensor that was written.
    """
    which = _implementation(logits)
    if which == "triton":
        from metareward_kernels.triton_head_rows import logit_gradient_rows_triton_

        return logit_gradient_rows_triton_(logits, targets, lse, coefficient, temperature, out)
    if which == "cpp" and (out is None or out.dtype == torch.bfloat16):
        torch.ops.metareward.logit_gradient_rows_cpp_(
            logits, targets.contiguous(), lse.contiguous(), coefficient.contiguous(), temperature, out
        )
        return logits if out is None else out
    if which == "cuda":
        return cuda_head_rows.logit_gradient_rows_(logits, targets, lse, coefficient, temperature, out)
    scale = (coefficient / temperature)[:, None]
    gradient = (logits.to(lse.dtype) / temperature).sub_(lse[:, None]).exp_().mul_(-scale)
    gradient.scatter_add_(1, targets[:, None], scale)
    return (logits if out is None else out).copy_(gradient)
