"""Causal attention over sequences packed one after another in a row, without padding: a forest whose trees are single segments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from metareward.model.decoder import Attend


def packed_attention(cu_seqlens: Sequence[int] | Tensor) -> Attend:
    """An `Attend` for sequences that begin and end at cu_seqlens = [0, end of the first, ..., T].

    Every query sees the keys of its own sequence up to its own position. Differentiable; dtypes and devices as
    `metareward_kernels.segment_attention` has them. Raises ValueError when the boundaries do not ascend from 0, or do not
    fit the row they are used on.
    """
    from metareward_kernels import SegmentTree, segment_attention

    bounds = [int(b) for b in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
    if len(bounds) < 2 or bounds[0] != 0 or any(end <= start for start, end in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must ascend from 0, got {bounds}")
    lengths = [end - start for start, end in pairwise(bounds)]
    tree = SegmentTree.of(lengths, [-1] * len(lengths))

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[0] != bounds[-1]:
            raise ValueError(f"cu_seqlens ends at {bounds[-1]} but the row has {query.shape[0]} tokens")
        return segment_attention(query, key, value, tree, query.shape[-1] ** -0.5)

    return attend
