"""Log-probs of target tokens straight from hidden states: softmax(hidden @ weight.T), never held for all tokens.

The head is where the memory of preference training goes: [T,V] logits in fp32 are 8 GB at T = 16,384, V = 128,256.
Here the tokens are cut into chunks; the forward pass keeps one log-sum-exp a token and the backward pass computes the
chunk's logits again. FLOP: 2THV forward; 6THV backward, 4THV with one input frozen. Bytes beyond the inputs and
gradients: a chunk's logits in fp32, in the backward pass also their gradient in the inputs' dtype, and the fp32 weight
gradient. The compiled path turns logits into log-probs, or into their gradient, in two reads; fp32 logits of bf16 inputs
it makes a few rows at a time, fp32 gradients in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metareward_kernels import dispatch
from metareward_kernels.linear_fp32 import linear_fp32

CHUNK_TOKENS = 1024
LOGIT_ROWS = (
    256  # fp32 logits of bf16 inputs at a time on the compiled path: fresh memory costs as much as arithmetic
)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, tokens))


def _compiled(hidden: Tensor) -> bool:
    """Whether the row passes run compiled; `linear_fp32` chooses for the logits' product by itself."""
    known = hidden.dtype in (torch.float32, torch.bfloat16)
    unsupported = None if known else f"the compiled op takes float32 and bfloat16, not {hidden.dtype}"
    return dispatch.implementation("linear_logprob", hidden.device.type, unsupported) == "cpp"


def _logit_rows(hidden: Tensor, chunk_tokens: int) -> int:
    """Rows of fp32 logits that the compiled path holds at once."""
    rows = min(hidden.shape[0], chunk_tokens)
    return rows if hidden.dtype == torch.float32 else min(rows, LOGIT_ROWS)


def _compiled_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    temperature: float,
    out: Tensor,
) -> None:
    """`_logit_gradient` into out [C,V] of the inputs' dtype."""
    in_place = out.dtype == torch.float32
    step = _logit_rows(hidden, hidden.shape[0])
    buffer = out if in_place else torch.empty(step, weight.shape[0], dtype=torch.float32)
    for part in _chunks(hidden.shape[0], step):
        rows = hidden[part]
        logits = linear_fp32(rows, weight, out=buffer[: rows.shape[0]])
        torch.ops.metareward.logit_gradient_rows_cpp_(
            logits, targets[part], lse[part], grad[part], temperature, None if in_place else out[part]
        )


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[C,V] logits in the accumulation dtype."""
    logits = linear_fp32(hidden, weight)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _forward_chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = _scaled_logits(hidden, weight, temperature)
    top = logits.amax(dim=1, keepdim=True)
    shifted = logits.sub_(top)
    # Both terms come from the same logits: shifted <= 0, and the sum holds exp(0) = 1, so log p <= 0 without a clamp.
    at_target = shifted.gather(1, targets[:, None]).squeeze(1)
    log_sum = shifted.exp_().sum(dim=1).log_()
    return at_target - log_sum, top.squeeze(1) + log_sum


def _logit_gradient(
    hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, temperature: float
) -> Tensor:
    """[C,V] gradient of the unscaled logits, grad * (onehot - p) / temperature, in the inputs' dtype."""
    coefficient = (grad / temperature)[:, None]
    gradient = _scaled_logits(hidden, weight, temperature).sub_(lse[:, None]).exp_().mul_(-coefficient)
    gradient.scatter_add_(1, targets[:, None], coefficient)
    return gradient.to(hidden.dtype)


@torch.library.custom_op("metareward::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    compiled = _compiled(hidden)
    logprobs = torch.empty(tokens, dtype=_accumulation_dtype(hidden.dtype), device=hidden.device)
    lse = torch.empty_like(logprobs)
    if tokens == 0:
        return logprobs, lse
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= vocabulary:
        raise IndexError(f"targets span [{low}, {high}], outside the vocabulary's [0, {vocabulary - 1}]")
    step = _logit_rows(hidden, chunk_tokens) if compiled else chunk_tokens
    buffer = torch.empty(step if compiled else 0, vocabulary, dtype=logprobs.dtype, device=hidden.device)
    for part in _chunks(tokens, step):
        if compiled:
            rows = hidden[part]
            logits = linear_fp32(rows, weight, out=buffer[: rows.shape[0]])
            found = torch.ops.metareward.logprob_rows_cpp(logits, targets[part].contiguous(), temperature)
        else:
            found = _forward_chunk(hidden[part], weight, targets[part], temperature)
        logprobs[part], lse[part] = found
    return logprobs, lse


@_linear_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    shape = (hidden.shape[0],)
    dtype = _accumulation_dtype(hidden.dtype)
    return (
        torch.empty(shape, dtype=dtype, device=hidden.device),
        torch.empty(shape, dtype=dtype, device=hidden.device),
    )


@torch.library.custom_op("metareward::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    temperature: float,
    chunk_tokens: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    total = weight.new_zeros(weight.shape if need_weight else (0,), dtype=_accumulation_dtype(weight.dtype))
    compiled = _compiled(hidden)
    buffer = hidden.new_empty(min(hidden.shape[0], chunk_tokens) if compiled else 0, weight.shape[0])
    grad, targets = grad.contiguous(), targets.contiguous()
    for part in _chunks(hidden.shape[0], chunk_tokens):
        rows = hidden[part]
        if compiled:
            gradient = buffer[: rows.shape[0]]
            _compiled_gradient(rows, weight, targets[part], lse[part], grad[part], temperature, gradient)
        else:
            gradient = _logit_gradient(rows, weight, targets[part], lse[part], grad[part], temperature)
        if need_hidden:
            torch.mm(gradient, weight, out=grad_hidden[part])
        if need_weight and total.dtype == rows.dtype:
            total.addmm_(gradient.T, rows)
        elif need_weight:
            total += gradient.T @ rows
    return grad_hidden, total.to(weight.dtype, copy=False)


@_linear_logprob_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    temperature: float,
    chunk_tokens: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, ctx.temperature, ctx.chunk_tokens = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(
    ctx: Any, grad: Tensor, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = torch.ops.metareward.linear_logprob_backward(
        grad, *ctx.saved_tensors, ctx.temperature, ctx.chunk_tokens, need_hidden, need_weight
    )
    return grad_hidden if need_hidden else None, grad_weight if need_weight else None, None, None, None


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


def linear_logprob(
    hidden: Tensor,  # [T,H]
    weight: Tensor,  # [V,H]
    targets: Tensor,  # [T]
    *,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Log-prob of each target under softmax(hidden @ weight.T / temperature).

    hidden [T,H] and weight [V,H] of one floating dtype, any strides; targets [T] int64 in [0, V).
    Returns [T] float32 (float64 for float64 inputs), each at most 0. Differentiable in hidden and weight: a frozen one
    costs no product; gradients come in the inputs' dtypes, the weight's summed over chunks in fp32 first.
    In bf16 the products take bf16 numbers; logits and softmax are fp32, the logits' gradient bf16. chunk_tokens bounds the
    logits held at once.
    Raises IndexError for a target outside the vocabulary, TypeError or ValueError for other dtypes, shapes or
    a temperature that is not positive.
    """
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise TypeError(
            f"hidden and weight must have one floating dtype, got {hidden.dtype} and {weight.dtype}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden [T,H] and weight [V,H], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need one target a token, got {list(targets.shape)} for {hidden.shape[0]} tokens")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    return _linear_logprob(hidden, weight, targets, temperature, chunk_tokens)[0]
