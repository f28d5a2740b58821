"""segment_attention refuses trees and inputs that do not fit together, with what is wrong and what was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from metareward_kernels import SegmentTree, implementation, segment_attention
from torch import Tensor

from tests.kernels.segment_checks import make

HAS_CPP = implementation("segment_attention") == "cpp"
needs_library = pytest.mark.skipif(not HAS_CPP, reason="the compiled library is not built")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("offsets", "parents", "error", "message"),
    [
        (int32(0, 4), int32(0), ValueError, "earlier segment, or -1"),
        (int32(0, 4), int32(-2), ValueError, "earlier segment, or -1"),
        (int32(0, 4, 2), int32(-1, 0), ValueError, "rise from 0"),
        (int32(1, 4), int32(-1), ValueError, "rise from 0"),
        (int32(0, 4), int32(-1, 0), ValueError, r"offsets \[S\+1\]"),
        (int32(), int32(), ValueError, r"offsets \[S\+1\]"),
        (int32(0, 4).long(), int32(-1), TypeError, "offsets must be an int32 vector"),
        (int32(0, 4), int32(-1)[None], TypeError, "parents must be an int32 vector"),
        ([0, 4], int32(-1), TypeError, "SegmentTree.of"),
        (int32(0, 4), int32(-1).to("meta"), ValueError, "parents must lie on the CPU"),
    ],
)
def test_mistakes_in_the_tree(offsets: Any, parents: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SegmentTree(offsets, parents)


def test_mistakes_in_the_inputs() -> None:
    tree = SegmentTree.of([4, 2], [-1, 0])
    (query, key, value), _ = make(6, (4, 2), 8)
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((query.double(), key, value, tree, 1.0), TypeError, "one floating dtype"),
        ((query.int(), key.int(), value.int(), tree, 1.0), TypeError, "one floating dtype"),
        ((query, key, value, [0, 6], 1.0), TypeError, "must be a SegmentTree, got list"),
        ((query[0], key, value, tree, 1.0), ValueError, r"need query \[T,Hq,D\]"),
        ((query, key, value[:, :1], tree, 1.0), ValueError, r"need query \[T,Hq,D\]"),
        ((query, key[:, :, :4], value[:, :, :4], tree, 1.0), ValueError, "differ in tokens or channels"),
        ((query[:5], key, value, tree, 1.0), ValueError, "differ in tokens or channels"),
        ((query[:, :3], key, value, tree, 1.0), ValueError, "multiple of key heads, got 3 and 2"),
        ((query, key[:, :0], value[:, :0], tree, 1.0), ValueError, "multiple of key heads"),
        ((query[:5], key[:5], value[:5], tree, 1.0), ValueError, "hold 6 tokens but the query has 5"),
        ((query, key, value, tree, 0.0), ValueError, "scale must be positive"),
        ((query, key, value, tree, float("nan")), ValueError, "scale must be positive"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            segment_attention(*arguments)


@needs_library
def test_the_compiled_op_checks_what_it_would_read() -> None:
    (query, key, value), _ = make(6, (4, 2), 8)
    op = torch.ops.metareward.segment_attention_cpp
    for offsets, parents, message in [
        (int32(0, 7), int32(-1), "the query has 6"),
        (int32(0, 9, 6), int32(-1, 0), "ends before it starts"),
        (int32(0, 6), int32(0), "is not before it"),
        (int32(0, 6).long(), int32(-1), "int32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(query, key, value, offsets, parents, 1.0)
    with pytest.raises(RuntimeError, match="key must be"):
        op(query, key[:, :, :4], value, int32(0, 6), int32(-1), 1.0)
    with pytest.raises(RuntimeError, match="value must be"):
        op(query, key, value.bfloat16(), int32(0, 6), int32(-1), 1.0)
