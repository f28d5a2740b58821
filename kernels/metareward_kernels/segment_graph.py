"""Segment attention as one op of a traced graph, for torch.compile.

A compiler can neither follow a tree of segments nor compile anew for every tree. So the tree comes as a tensor, which the op
reads when it runs, and the implementation is chosen then too. Numbers and gradients are those of `segment_attention`.

The compiled implementation (CPU) keeps its log-sum-exp for the backward pass. On every other device
nothing is kept: the backward pass computes attention again, 4 D FLOP a query head, query and key on top of 10 D. Has never
run on a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from metareward_kernels.segment_attention import runs_compiled, segment_attention_uncompiled
from metareward_kernels.segment_tree import SegmentTree


@lru_cache(maxsize=4)
def _tree(offsets: tuple[int, ...], parents: tuple[int, ...]) -> SegmentTree:
    """The tree with these numbers; kept, so that all layers share its masks."""
    return SegmentTree(
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor(parents, dtype=torch.int32),
    )


def _tree_of(table: Tensor, tokens: int) -> SegmentTree:
    offsets, parents = table.tolist()
    tree = _tree(tuple(offsets), tuple(parents[:-1]))
    if tree.tokens != tokens:
        raise ValueError(f"the segments hold {tree.tokens} tokens but the query has {tokens}")
    return tree


def _rows(part: Tensor) -> Tensor:
    """As the compiled op reads it: channels beside each other."""
    return part if part.stride(2) == 1 else part.contiguous()


@torch.library.custom_op("metareward::traced_segment_attention", mutates_args=())
def _traced(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """([T,Hq,D] result, [T,Hq] float32 log-sum-exp, zeros from the PyTorch path)"""
    if runs_compiled(query):
        found: tuple[Tensor, Tensor] = torch.ops.metareward.segment_attention_cpp(
            _rows(query), _rows(key), _rows(value), table[0], table[1, :-1], scale
        )
        return found
    out = segment_attention_uncompiled(query, key, value, _tree_of(table, len(query)), scale)
    return out.contiguous(), query.new_zeros(query.shape[:2], dtype=torch.float32)


@_traced.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_zeros(query.shape[:2], dtype=torch.float32)


# Not a custom_op: those run with autograd out of reach, and the PyTorch path differentiates inside.
_BACKWARD = "metareward::traced_segment_attention_backward"
torch.library.define(
    _BACKWARD,
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor table, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)


@torch.library.impl(_BACKWARD, "default")
def _gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value."""
    if runs_compiled(query):
        found: tuple[Tensor, ...] = torch.ops.metareward.segment_attention_backward_cpp(
            _rows(grad), _rows(query), _rows(key), _rows(value), out, lse, table[0], table[1, :-1], scale
        )
        return found
    tree = _tree_of(table, len(query))
    with torch.enable_grad():
        query, key, value = (part.detach().requires_grad_() for part in (query, key, value))
        again = segment_attention_uncompiled(query, key, value, tree, scale)
    return tuple(part.contiguous() for part in torch.autograd.grad(again, (query, key, value), grad))


@torch.library.register_fake(_BACKWARD)
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, table, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, table)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = torch.ops.metareward.traced_segment_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return (*found, None, None)


_traced.register_autograd(_backward, setup_context=_setup_context)


def traced_segment_attention(
    query: Tensor,  # [T,Hq,D]
    key: Tensor,  # [T,Hk,D]
    value: Tensor,  # [T,Hk,D]
    table: Tensor,  # [2,S+1] int32 on the CPU: SegmentTree.table
    scale: float,
) -> Tensor:
    """`segment_attention` with the tree as a tensor: [T,Hq,D], differentiable in query, key and value.

    Inputs are not checked while a graph is traced; a tree of another number of tokens raises when the op runs.
    """
    out: Tensor = _traced(query, key, value, table, scale)[0]
    return out
