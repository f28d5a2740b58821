"""Attention of training over a packed tree of segments, forward and backward.

A row of T tokens is cut into segments: what several sequences begin with is there once, above what follows it. A token
sees all tokens of its segment's ancestors and its own segment up to itself, so the numbers and the gradients are those of
separate sequences (after arXiv 2410.20305, which shares the prompt of a pair). [T,T] is never built.

A query and a key that it sees cost 4 D FLOP a query head, 10 D in the backward pass. The compiled op (CPU) stacks the
query heads that share a key head, never repeats or copies keys for them, keeps a log-sum-exp a query, and makes
scores and weights once in the backward pass; scores, softmax and sums are fp32. With bf16 inputs on CPUs that multiply
bf16 it rounds the weights and their gradients to bf16 for the products, as flash-attention does. The backward pass
holds fp32 partial sums of dQ: [T,Hq,D] for each stretch of some 512 keys that a query sees, and never more than about ten.
On a GPU one call of a variable-length flash kernel serves all segments (`segment_varlen`), where there is one for the dtype.
The PyTorch path is one scaled_dot_product_attention a segment. It runs on any device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metareward_kernels import dispatch
from metareward_kernels.segment_tree import SegmentTree
from metareward_kernels.segment_varlen import kernel_for, segment_attention_varlen


def segment_attention_torch(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentTree, scale: float
) -> Tensor:
    """The PyTorch path of `segment_attention`: the largest mask is [segment, ancestors + segment]."""
    # [T, heads, D] -> [1, heads, T, D], the layout of scaled_dot_product_attention.
    query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        # The CPU's flash kernel wants as many key heads as query heads.
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    parts: list[Tensor] = []
    for own, ancestors in segments.spans():
        length = own.stop - own.start
        if length == 0:
            continue
        context = sum(span.stop - span.start for span in ancestors)
        if context == 0:
            parts.append(
                F.scaled_dot_product_attention(
                    query[:, :, own], key[:, :, own], value[:, :, own], is_causal=True, scale=scale
                )
            )
            continue
        spans = (*ancestors, own)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, own],
                torch.cat([key[:, :, span] for span in spans], 2),
                torch.cat([value[:, :, span] for span in spans], 2),
                attn_mask=segments.mask(context, length, query.device),
                scale=scale,
            )
        )
    # No tokens: an empty result that still depends on all three.
    out = torch.cat(parts, 2) if parts else query * (key.sum() + value.sum())
    return out.squeeze(0).transpose(0, 1)


def segment_attention_uncompiled(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentTree, scale: float
) -> Tensor:
    """`segment_attention` by a GPU's variable-length kernel where there is one for these queries, else in PyTorch."""
    varlen = kernel_for(query)
    if varlen is None:
        return segment_attention_torch(query, key, value, segments, scale)
    return segment_attention_varlen(query, key, value, segments.layout(query.device), scale, varlen[1])


def runs_compiled(query: Tensor) -> bool:
    """Whether the compiled op computes attention of these queries; see `segment_attention`."""

    def unsupported(implementation: str) -> str | None:
        return dispatch.unsupported_dtype(implementation, query.dtype)

    if query.device.type != "cpu":
        return False
    return dispatch.implementation("segment_attention", "cpu", unsupported) == "cpp"


def segment_attention(
    query: Tensor,  # [T,Hq,D]
    key: Tensor,  # [T,Hk,D]
    value: Tensor,  # [T,Hk,D]
    segments: SegmentTree,
    scale: float,
) -> Tensor:
    """Softmax attention of every token over its segment's ancestors and, causally, over its own segment.

    query [T,Hq,D], key and value [T,Hk,D] of one floating dtype and device, any strides; Hq a multiple of Hk; query
    head h reads key head h // (Hq / Hk). segments: a tree over the T tokens, made once for all layers. scale multiplies
    the scores and is positive.
    Returns [T,Hq,D] in the query's dtype; differentiable in query, key and value. The same input gives the same bits
    on the compiled path, whatever the number of threads. A value that is not finite stays within the sequences that hold
    it: forward in those that see it, backward in all their tokens.
    float32 and bfloat16 on the CPU run compiled, other dtypes there in PyTorch unless the compiled op is forced, which
    raises. float16 and bfloat16 on a GPU run by flash-attn's or PyTorch's variable-length kernel, unless plain PyTorch is
    forced; everything else in PyTorch. No GPU path has ever run on one.
    Raises TypeError or ValueError for inputs that do not fit together.
    """
    if not (query.dtype == key.dtype == value.dtype and query.is_floating_point()):
        raise TypeError(
            f"query, key and value must have one floating dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if not isinstance(segments, SegmentTree):
        raise TypeError(f"segments must be a SegmentTree, got {type(segments).__name__}; see SegmentTree.of")
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape:
        raise ValueError(
            "need query [T,Hq,D] and key, value [T,Hk,D], got "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    tokens, query_heads, dim = query.shape
    if key.shape[0] != tokens or key.shape[2] != dim or dim == 0:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} differ in tokens or channels")
    if key.shape[1] == 0 or query_heads == 0 or query_heads % key.shape[1] != 0:
        raise ValueError(f"query heads must be a multiple of key heads, got {query_heads} and {key.shape[1]}")
    if segments.tokens != tokens:
        raise ValueError(f"the segments hold {segments.tokens} tokens but the query has {tokens}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}; 1 / sqrt(D) is usual")
    if not runs_compiled(query):
        return segment_attention_uncompiled(query, key, value, segments, scale)
    query, key, value = (part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value))
    out: Tensor = torch.ops.metareward.segment_attention_cpp(
        query, key, value, segments.offsets, segments.parents, float(scale)
    )[0]
    return out
