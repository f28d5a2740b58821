"""Which results of a block are kept for the backward pass, and which are computed again: activation checkpointing.

"none" keeps everything; "full" keeps a block's input and computes the block again; "selective" also keeps what is dear to compute
and small beside the rest, the outputs of matrix products and of attention, and computes again norms, rotations and activations.
The gradients are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "selective", "full"]

_aten = torch.ops.aten
PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default})
ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)


def is_attention(op: Any) -> bool:
    """PyTorch's fused attention, ours, or flash-attn's; an op that writes into its arguments cannot be kept."""
    if op in ATTENTION:
        return True
    # torch_attn: PyTorch's variable-length attention.
    named = op.namespace in ("flash_attn", "torch_attn") or (
        op.namespace == "metareward" and "attention" in str(op)
    )
    return named and not op._schema.is_mutable


def policy(last_input: int, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep products and attention, but for the block's last product (of `last_input` channels): nothing needs its output."""
    last = op in PRODUCTS and args[-2].shape[-1] == last_input
    kept = is_attention(op) or (op in PRODUCTS and not last)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(mode: Recompute, last_input: int, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, keeping for its backward pass what `mode` says; last_input: channels that its last product takes.

    Under torch.compile the same choice is made while the graph is cut into forward and backward.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    if mode == "full":
        kept: Tensor = checkpoint(function, *args, use_reentrant=False)
        return kept
    contexts = partial(create_selective_checkpoint_contexts, partial(policy, last_input))
    kept = checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
    return kept
