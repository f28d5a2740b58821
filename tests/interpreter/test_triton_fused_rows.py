"""Triton's fused row ops in the interpreter against fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from metareward_kernels.triton_fused_rows import add_rms_norm_triton, rotate_and_store_triton, silu_mul_triton
from torch import Tensor

Run = Callable[..., Any]

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 576), (5, 37), (0, 64)])
def test_add_rms_norm(run: Run, dtype: torch.dtype, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    wide = torch.randn(rows, width + 5, generator=generator).to(dtype)
    residual = wide[:, :width]  # rows of a wider tensor
    delta = torch.randn(width, rows, generator=generator).to(dtype).T
    weight = torch.randn(width, generator=generator).to(dtype)
    assert_near(
        run(add_rms_norm_triton, residual, None, weight, 1e-5),
        rms_norm(residual.double(), weight.double(), 1e-5),
    )
    if rows > 1:
        delta[1, 0] = math.nan
        residual[2] = 0.0
        delta[2] = 0.0
    wanted, beyond = residual.float() + delta.float(), wide[:, width:].clone()
    found = run(add_rms_norm_triton, residual, delta, weight, 1e-5)
    assert residual.equal(wanted.to(dtype)) if rows <= 1 else residual[2:].equal(wanted[2:].to(dtype))
    assert wide[:, width:].equal(beyond)
    assert_near(found, rms_norm(residual.double(), weight.double(), 1e-5))
    if rows > 1:
        assert found[1].isnan().all()
        assert not found[2].any()


def test_a_residual_wider_than_the_weights(run: Run) -> None:
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(3, 40, generator=generator)
    delta, weight = (torch.randn(n, 40, generator=generator).half() for n in (3, 1))
    wanted = residual + delta.float()
    found = run(add_rms_norm_triton, residual, delta, weight[0], 1e-5)
    assert residual.equal(wanted)
    assert found.dtype == torch.float16
    assert_near(found, rms_norm(wanted.double(), weight[0].double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 8), (7, 1, 80)])
@pytest.mark.parametrize("norm", ["", "qk", "k"])
def test_rotate_and_store(
    run: Run, dtype: torch.dtype, query_heads: int, kv_heads: int, dim: int, norm: str
) -> None:
    rows, page = 5, 4
    generator = torch.Generator().manual_seed(dim)
    qkv = torch.randn(rows, (query_heads + 2 * kv_heads) * dim, generator=generator).to(dtype)
    angles = torch.randn(rows, 1, dim // 2, generator=generator) * 50
    cos = torch.cat([angles.cos(), angles.cos()], dim=-1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(dtype)
    slots = torch.tensor([7, 0, 22, -1, 13])
    weights = torch.randn(2, dim, generator=generator).to(dtype)
    pages = torch.full((7, page, 2 * kv_heads, dim), 9.0, dtype=dtype)
    key_pages, value_pages = pages[:, :, ::2], pages[:, :, 1::2]
    arguments = (weights[0] if "q" in norm else None, weights[1] if "k" in norm else None, 1e-6)
    query = run(rotate_and_store_triton, qkv, cos, sin, slots, key_pages, value_pages, *arguments)

    heads = qkv.double().view(rows, -1, dim)
    turned = heads[:, : query_heads + kv_heads].clone()
    for name, part, weight in (
        ("q", slice(query_heads), weights[0]),
        ("k", slice(query_heads, None), weights[1]),
    ):
        if name in norm:
            turned[:, part] = rms_norm(turned[:, part], weight.double(), 1e-6)
    turned = turned * cos.double() + turned.roll(dim // 2, dims=-1) * sin.double()
    assert_near(query, turned[:, :query_heads])
    wanted_keys = torch.full(key_pages.shape, 9.0, dtype=torch.float64)
    wanted_values = wanted_keys.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted_keys[slot // page, slot % page] = turned[row, query_heads:]
            wanted_values[slot // page, slot % page] = heads[row, query_heads + kv_heads :]
    assert_near(key_pages, wanted_keys)
    assert value_pages.double().equal(wanted_values)
    none = run(rotate_and_store_triton, qkv[:0], cos[:0], sin[:0], slots[:0], key_pages, value_pages)
    assert none.shape == (0, query_heads, dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 1536), (0, 8)])
def test_silu_mul(run: Run, dtype: torch.dtype, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    wide = (torch.randn(rows, 2 * width + 3, generator=generator) * 4).to(dtype)
    gate_up = wide[:, : 2 * width]
    if rows > 1:
        gate_up[0, 0], gate_up[0, 1] = 80.0, -100.0  # e^100 overflows fp32: the result is 0, not NaN
        gate_up[1, 5] = math.nan
    gate, up = gate_up.double().split(width, dim=1)
    found = run(silu_mul_triton, gate_up)
    assert_near(found, torch.nn.functional.silu(gate) * up)
    assert int(found.isnan().sum()) == (rows > 1)
    assert_near(run(silu_mul_triton, gate_up.T.contiguous().T), found)
