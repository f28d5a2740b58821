"""Log-probs of target tokens from logits that are there already: log-softmax and gather in one pass.

For models whose logits are needed as such (soft caps, biases of their own); `linear_logprob` never makes them. The forward
pass reads the logits once and keeps one log-sum-exp a row; the backward pass turns the logits into their gradient where they
lie, so that training holds [T,V] once, not two or three times. Bytes: T V elements read forward, read and written backward.
The row passes are those of `head_rows`, and so is the choice of implementation. Where they need contiguous rows, or run in
plain PyTorch in fp32, they get a block of rows at a time, so that the bytes beyond the logits stay bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metareward_kernels import dispatch
from metareward_kernels.head_rows import accumulation_dtype, logit_gradient_rows_, logprob_rows

BLOCK_ELEMENTS = 1 << 22  # logits copied at a time: 16 MiB in fp32


def _matrices(logits: Tensor, first_row: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Views [n,V] that make up logits [...,V], each with the number of rows before it."""
    try:
        matrix = logits.view(-1, logits.shape[-1])
    except RuntimeError:  # the leading dimensions are not one stride
        for part in logits:
            yield from _matrices(part, first_row)
            first_row += part.shape[:-1].numel()
    else:
        yield first_row, matrix


def _row_blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Views [n,V] of logits [...,V] and the rows that they are: all at once where a kernel of ours takes them as they lie."""
    which = dispatch.implementation(
        "head_rows", logits.device.type, lambda which: dispatch.unsupported_dtype(which, logits.dtype)
    )
    for first_row, matrix in _matrices(logits):
        whole = which != "torch" and matrix.is_contiguous()
        step = max(1, len(matrix) if whole else BLOCK_ELEMENTS // matrix.shape[1])
        for start in range(0, len(matrix), step):
            block = matrix[start : start + step]
            yield slice(first_row + start, first_row + start + len(block)), block


def _overlaps(logits: Tensor) -> bool:
    """Whether two elements may lie in one place, as in an expanded tensor."""
    reach = 0
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * max(0, size - 1)
    return False


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if targets.numel() == 0:
        return
    if (
        targets.device.type == "cuda"
    ):  # reading them back would wait for the device: the device itself asserts
        inside = ((targets >= 0) & (targets < vocabulary)).all()
        torch._assert_async(inside, f"a target lies outside the vocabulary's [0, {vocabulary - 1}]")
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= vocabulary:
        raise IndexError(f"targets span [{low}, {high}], outside the vocabulary's [0, {vocabulary - 1}]")


@torch.library.custom_op("metareward::gather_logprob", mutates_args=())
def _gather_logprob(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs, log-sum-exps), both shaped like targets."""
    _check_targets(targets, logits.shape[-1])
    logprobs = torch.empty(targets.numel(), dtype=accumulation_dtype(logits.dtype), device=logits.device)
    lse = torch.empty_like(logprobs)
    flat = targets.reshape(-1)
    if len(flat):
        for rows, block in _row_blocks(logits):
            found = logprob_rows(block.contiguous(), flat[rows], temperature)
            logprobs[rows], lse[rows] = found.logprobs, found.lse
    return logprobs.view(targets.shape), lse.view(targets.shape)


@_gather_logprob.register_fake
def _(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(logits.dtype)
    return (
        torch.empty(targets.shape, dtype=dtype, device=logits.device),
        torch.empty(targets.shape, dtype=dtype, device=logits.device),
    )


@torch.library.custom_op("metareward::gather_logprob_backward_", mutates_args=("logits",))
def _gather_logprob_backward_(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, temperature: float
) -> None:
    """The logits become their gradient."""
    if targets.numel() == 0:
        return
    flat_targets, flat_lse, flat_grad = targets.reshape(-1), lse.reshape(-1), grad.reshape(-1)
    for rows, block in _row_blocks(logits):
        part = block.contiguous()
        logit_gradient_rows_(part, flat_targets[rows], flat_lse[rows], flat_grad[rows], temperature)
        if part is not block:
            block.copy_(part)


@_gather_logprob_backward_.register_fake
def _(grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, temperature: float) -> None:
    return None


@torch.library.custom_op("metareward::gather_logprob_backward", mutates_args=())
def _gather_logprob_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, temperature: float
) -> Tensor:
    """The gradient in memory of its own."""
    gradient = logits.clone(memory_format=torch.contiguous_format)
    _gather_logprob_backward_(grad, gradient, targets, lse, temperature)
    return gradient


@_gather_logprob_backward.register_fake
def _(grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, temperature: float) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.temperature = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    gradient = torch.ops.metareward.gather_logprob_backward(grad, *ctx.saved_tensors, ctx.temperature)
    return gradient, None, None


_gather_logprob.register_autograd(_backward, setup_context=_setup_context)


class _GatherInPlace(torch.autograd.Function):
    """The same, but the gradient takes the logits' place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        logprobs, lse = _gather_logprob(logits, targets, temperature)
        ctx.save_for_backward(logits, targets, lse)
        ctx.temperature, ctx.spent = temperature, False
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.spent:
            raise RuntimeError(
                "gather_logprob ran backward before, and its logits became their gradient; pass keep_logits=True "
                "to run it again"
            )
        try:
            logits, targets, lse = (
                ctx.saved_tensors
            )  # compares the logits' version with that of the forward pass
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "the logits changed between gather_logprob and its backward pass: another op works on them in place "
                "(a second gather_logprob of the same logits does); pass keep_logits=True to every one of them"
            ) from error
        ctx.spent = True
        gradient = logits.detach()  # the same storage and version: whoever else saved the logits is told
        _gather_logprob_backward_(grad, gradient, targets, lse, ctx.temperature)
        return gradient, None, None


def _check_in_place(logits: Tensor) -> None:
    base = logits if logits._base is None else logits._base
    if logits.is_leaf or base.is_leaf:
        raise ValueError(
            "logits are a leaf, or a view of one: their gradient would overwrite a parameter; pass keep_logits=True"
        )
    if _overlaps(logits):
        raise ValueError(
            f"logits of strides {logits.stride()} share memory among themselves, so their gradient has no room there; "
            "pass keep_logits=True or logits.contiguous()"
        )


def gather_logprob(
    logits: Tensor,  # [...,V]
    targets: Tensor,  # [...]
    *,
    temperature: float = 1.0,
    keep_logits: bool = False,
) -> Tensor:
    """Log-prob of each target under softmax(logits / temperature).

    logits [...,V] float32, bfloat16, float16 or float64, any strides; targets [...] int64 in [0, V).
    Returns [...] float32 (float64 for float64 logits), each at most 0, computed in that dtype. Differentiable in logits; their
    gradient has their dtype, and is formed in float32 before it is rounded.
    keep_logits False: after backward() the logits hold their gradient. That is right wherever nothing reads the logits later.
    An op that saved them for its own backward pass and runs after this one raises, and so does a second backward pass; logits
    that are a leaf or a view of one, and expanded ones, raise at once. True: the gradient is a tensor of its own, made from a
    copy. Under torch.compile it always is one: there the compiler owns the memory.
    Raises TypeError or ValueError for other dtypes, shapes, devices or a temperature that is not positive. A target outside
    the vocabulary raises IndexError on a CPU and is a device-side assertion on a GPU: see `metareward_kernels`.
    """
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}; pass targets.long()")
    if logits.dim() < 1 or logits.shape[-1] < 1 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"need logits [...,V] and one target a row, got {list(logits.shape)} and {list(targets.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, targets on {targets.device}; move one of them")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if keep_logits or torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return _gather_logprob(logits, targets, temperature)[0]
    _check_in_place(logits)
    return _GatherInPlace.apply(logits, targets, temperature)
