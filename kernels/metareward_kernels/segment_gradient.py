"""What autograd is to know of the compiled attention over a tree of segments: its backward pass is a compiled op too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, offsets, parents, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, offsets, parents)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    gradients = torch.ops.metareward.segment_attention_backward_cpp(grad, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None, None)


def register_gradient() -> None:
    """Make the compiled op differentiable; once, after the library is loaded."""
    torch.library.register_autograd(
        "metareward::segment_attention_cpp", _backward, setup_context=_setup_context
    )
