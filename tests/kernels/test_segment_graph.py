"""Segment attention as one op of a traced graph: the same numbers, one graph for all trees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from metareward_kernels import SegmentTree, implementation, segment_attention, traced_segment_attention
from torch import Tensor

from tests.kernels.segment_checks import TREES, make, run

HAS_CPP = implementation("segment_attention") == "cpp"


@pytest.fixture(params=["cpp", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpp" and not HAS_CPP:
        pytest.skip("the compiled library is not built")
    monkeypatch.setenv("METAREWARD_KERNELS", request.param)
    return request.param


def traced(query: Tensor, key: Tensor, value: Tensor, tree: SegmentTree, scale: float) -> Tensor:
    return traced_segment_attention(query, key, value, tree.table, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["one sequence", "one-token segments", "depth three", "empty segments"])
def test_the_op_of_a_graph_is_the_same(
    kernels: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients to the bit, also for rows of a wider tensor; float64 takes the PyTorch path by itself."""
    if dtype == torch.float64:
        monkeypatch.delenv("METAREWARD_KERNELS")
    tree = SegmentTree.of(*TREES[name])
    inputs, grad = make(tree.tokens, (6, 2), 24, dtype)
    inputs = [torch.stack([part, part], 1)[:, 0] for part in inputs]
    found, wanted = (run(attention, inputs, tree, 0.3, grad) for attention in (traced, segment_attention))
    assert all(torch.equal(ours, true) for ours, true in zip(found, wanted, strict=True))


def test_the_op_of_a_graph_in_a_graph(kernels: str) -> None:
    """One graph for trees of other sizes, with no break in it."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(traced_segment_attention, fullgraph=True, backend=backend)

    def in_graph(query: Tensor, key: Tensor, value: Tensor, tree: SegmentTree, scale: float) -> Tensor:
        for part, dimension in ((query, 0), (key, 0), (value, 0), (tree.table, 1)):
            torch._dynamo.mark_dynamic(part, dimension)
        return compiled(query, key, value, tree.table, scale)

    for name in ("pair", "one sequence", "depth three", "several roots"):
        tree = SegmentTree.of(*TREES[name])
        inputs, grad = make(tree.tokens, (4, 2), 16)
        found, wanted = (
            run(attention, inputs, tree, 0.3, grad) for attention in (in_graph, segment_attention)
        )
        for ours, true in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


def test_the_op_of_a_graph_refuses_a_tree_of_other_tokens(kernels: str) -> None:
    inputs, _ = make(17, (2, 2), 8)
    with pytest.raises((ValueError, RuntimeError), match=r"segments .* tokens"):
        traced_segment_attention(*inputs, SegmentTree.of([9, 9], [-1, 0]).table, 0.3)
