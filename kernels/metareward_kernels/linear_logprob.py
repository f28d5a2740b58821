"""Log-probs of target tokens straight from hidden states: softmax(hidden @ weight.T + bias), never held for all tokens.

The head is where the memory of preference training goes: [T,V] logits in fp32 are 8 GB at T = 16,384, V = 128,256.
Here only a log-sum-exp a token outlives the forward pass; the backward pass computes the logits again, piece by piece.
FLOP: 2THV forward; 6THV backward, 4THV with hidden or weight frozen. On a GPU the Triton kernels of
`triton_linear_logprob` run, which never store a logit; elsewhere `chunked_logprob`, with compiled row passes on a CPU.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from metareward_kernels import dispatch
from metareward_kernels.chunked_logprob import chunked_logprob, chunked_logprob_backward
from metareward_kernels.head_rows import accumulation_dtype

CHUNK_TOKENS = 1024


def _unsupported(which: str, hidden: Tensor) -> str | None:
    if which == "triton":
        from metareward_kernels import triton_head_tiles

        return triton_head_tiles.unsupported(hidden)
    return dispatch.unsupported_dtype(which, hidden.dtype)


def _on_triton(hidden: Tensor) -> bool:
    """Whether the Triton kernels run; else by chunks, whose parts choose between compiled and PyTorch themselves."""
    which = dispatch.implementation(
        "linear_logprob", hidden.device.type, lambda which: _unsupported(which, hidden)
    )
    return which == "triton"


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    # On a GPU the check would wait for the device.
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= vocabulary:
        raise IndexError(f"targets span [{low}, {high}], outside the vocabulary's [0, {vocabulary - 1}]")


@torch.library.custom_op("metareward::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    chunk_tokens: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_targets(targets, weight.shape[0])
    if _on_triton(hidden):
        from metareward_kernels.triton_linear_logprob import linear_logprob_triton

        found = linear_logprob_triton(hidden, weight, targets, bias, temperature, entropy)
    else:
        found = chunked_logprob(hidden, weight, targets, bias, temperature, chunk_tokens, entropy)
    logprobs, lse, entropies = found
    return logprobs, lse, lse.new_empty(0) if entropies is None else entropies


@_linear_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    chunk_tokens: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    return logprobs, torch.empty_like(logprobs), torch.empty_like(logprobs if entropy else logprobs[:0])


@torch.library.custom_op("metareward::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    temperature: float,
    chunk_tokens: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needed = (need_hidden, need_weight, need_bias)
    arguments = (grad, hidden, weight, targets, bias, lse, temperature, chunk_tokens, needed)
    if _on_triton(hidden):
        from metareward_kernels.triton_linear_logprob import linear_logprob_backward_triton

        found = linear_logprob_backward_triton(*arguments)
    else:
        found = chunked_logprob_backward(*arguments)
    empty = [hidden.new_empty(0) if gradient is None else gradient for gradient in found]
    return empty[0], empty[1], empty[2]


@_linear_logprob_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    temperature: float,
    chunk_tokens: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, bias, ctx.temperature, ctx.chunk_tokens, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, output[1])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = tuple(ctx.needs_input_grad[at] for at in (0, 1, 3))
    found = torch.ops.metareward.linear_logprob_backward(
        grad, *ctx.saved_tensors, ctx.temperature, ctx.chunk_tokens, *needed
    )
    hidden, weight, bias = (gradient if need else None for gradient, need in zip(found, needed, strict=True))
    return hidden, weight, None, bias, None, None, None


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


def check_head_arguments(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> None:
    """Raise TypeError or ValueError for inputs of a head op that do not fit together."""
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
    if weight.shape[0] == 0:
        raise ValueError("weight [V,H] has no rows: a softmax needs a vocabulary of at least 1")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need one target a token, got {list(targets.shape)} for {hidden.shape[0]} tokens")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias must have the weight's dtype {weight.dtype}, got {bias.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"need bias [V] for weight {list(weight.shape)}, got {list(bias.shape)}")
    devices = {tensor.device for tensor in (hidden, weight, targets, bias) if tensor is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(f"hidden, weight, targets and bias must be on one device, got {names}")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: Literal[False] = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: Literal[True],
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor,  # [T,H]
    weight: Tensor,  # [V,H]
    targets: Tensor,  # [T]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    return_entropy: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target under softmax((hidden @ weight.T + bias) / temperature).

    hidden [T,H], weight [V,H] and bias [V] of one floating dtype on one device, any strides; targets [T] int64 in
    [0, V). A bias of -inf takes an entry out of the vocabulary.
    Returns [T] float32 (float64 for float64 inputs), each at most 0; with return_entropy also the entropy of each
    token's distribution in nats, [T]: a figure to log, not differentiable.
    Differentiable in hidden, weight and bias: a frozen one costs no product; gradients come in the inputs' dtypes, summed
    over tokens in fp32 first. In bf16 the products take bf16 numbers; logits and softmax are fp32, the logits' gradient
    bf16. At most chunk_tokens * V logits or their gradients are held at once (Triton: only in the backward pass).
    Raises TypeError or ValueError for other dtypes, shapes, devices or a temperature that is not positive. A target outside
    the vocabulary raises IndexError on a CPU and gives NaN on a GPU: see `metareward_kernels`.
    """
    check_head_arguments(hidden, weight, targets, bias, temperature)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    logprobs, _, entropies = _linear_logprob(
        hidden, weight, targets, bias, temperature, chunk_tokens, return_entropy
    )
    return (logprobs, entropies) if return_entropy else logprobs
