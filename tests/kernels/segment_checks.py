"""Trees, inputs and comparisons that the tests of segment attention share."""

from __future__ import annotations

from typing import Any

import torch
from metareward_kernels import SegmentTree, reference
from torch import Tensor

TREES: dict[str, tuple[list[int], list[int]]] = {
    "one token": ([1], [-1]),
    "one sequence": ([133], [-1]),
    "pair": ([70, 21, 34], [-1, 0, 0]),
    "one-token segments": ([1, 1, 1, 1], [-1, 0, 1, 1]),
    "several roots": ([5, 40, 17, 1, 9], [-1, -1, 1, 0, 3]),
    "depth three": ([130, 20, 3, 40, 1, 17, 5], [-1, 0, 1, 1, 0, 4, 4]),
    "empty segments": ([0, 30, 0, 12, 0], [-1, 0, 1, 2, 3]),
    "odd lengths past every block": ([129, 3, 257], [-1, 0, 0]),
    "keys of two units": ([700, 31], [-1, 0]),
}


def make(
    tokens: int, heads: tuple[int, int], dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randn(tokens, count, dim, generator=generator, dtype=torch.float64).to(dtype)

    return [draw(heads[0]), draw(heads[1]), draw(heads[1])], draw(heads[0])


def run(attention: Any, inputs: list[Tensor], tree: SegmentTree, scale: float, grad: Tensor) -> list[Tensor]:
    """The result and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves, tree, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact(inputs: list[Tensor], tree: SegmentTree, scale: float, grad: Tensor) -> list[Tensor]:
    return run(reference.segment_attention, [x.double() for x in inputs], tree, scale, grad.double())


def check(
    found: list[Tensor],
    wanted: list[Tensor],
    largest: float,
    mean: float | None = None,
    *,
    terms: float = 1.0,
    channels: slice = slice(None),
) -> None:
    """Error of every entry relative to the largest one; of the whole relative to the norm.

    terms: scale * sqrt(D), the size of what cancels in the gradients of query and key, down to 0 in a sequence of one token.
    channels: those of query and key that are compared.
    """
    for name, ours, true in zip(("out", "query", "key", "value"), found, wanted, strict=True):
        assert ours.shape == true.shape
        size = 1e-3
        if name in ("query", "key"):
            ours, true, size = ours[..., channels], true[..., channels], terms
        error = ours.double() - true
        assert error.abs().max() <= largest * true.abs().max().clamp(min=size), name
        assert mean is None or error.norm() <= mean * true.norm().clamp(min=size), name
