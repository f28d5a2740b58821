"""add_rms_norm, rotate_and_store and silu_mul: both implementations against the fp64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from metareward_kernels import add_rms_norm, implementation, reference, rotate_and_store, silu_mul
from torch import Tensor

from metareward.model.rope import rotate
from tests.on_gpu import on_gpu

COMPILED = implementation("silu_mul") == "cpp"
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
ROWS = [0, 1, 7, 600]


@pytest.fixture(params=["cpp", "torch", *(["gpu"] if torch.cuda.is_available() else [])], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("METAREWARD_KERNELS", raising=False)
    if request.param == "cpp" and not COMPILED:
        pytest.skip("the compiled library is not built")
    if request.param == "torch":
        monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    if request.param == "gpu":
        for op in (add_rms_norm, rotate_and_store, silu_mul):
            monkeypatch.setitem(globals(), op.__name__, on_gpu(op))
    return request.param


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """Within one rounding to the result's dtype of the fp64 value, and the error of sums of a few terms of size 10."""
    unit = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[found.dtype]
    terms = 2.0**-53 if found.dtype == torch.float64 else 2.0**-24
    torch.testing.assert_close(found.double(), exact, rtol=unit * 1.01 + 8 * terms, atol=20 * terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 17, 64, 576])
def test_add_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows + width)
    residual, delta = (torch.randn(2, rows, width) * 3).to(dtype)
    weight = torch.randn(width).to(dtype)
    sums = residual + delta  # rounds once
    expected = reference.rms_norm(sums.double(), weight.double(), 1e-5)
    found = add_rms_norm(residual, delta, weight, 1e-5)
    assert torch.equal(residual, sums)
    assert found.dtype == dtype
    assert_rounded_once(found, expected)
    before = residual.clone()
    assert torch.equal(add_rms_norm(residual, None, weight, 1e-5), found)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 17, 576])
def test_add_rms_norm_of_an_fp32_residual_with_bf16_weights(rows: int, width: int) -> None:
    torch.manual_seed(rows + width)
    residual = torch.randn(rows, width) * 3
    delta, weight = torch.randn(rows, width).bfloat16(), torch.randn(width).bfloat16()
    exact = residual.double()
    expected = reference.add_rms_norm(exact, delta.double(), weight.double(), 1e-5)
    sums = residual + delta
    found = add_rms_norm(residual, delta, weight, 1e-5)
    assert torch.equal(residual, sums)
    assert residual.dtype == torch.float32
    assert found.dtype == torch.bfloat16
    assert_rounded_once(residual, exact)
    assert_rounded_once(found, expected)
    assert torch.equal(add_rms_norm(residual, None, weight, 1e-5), found)
    assert torch.equal(residual, sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    rows = torch.tensor([0.0, 1e-30, 1e-3, 1e4, 1e15])[:, None].expand(5, 40).to(dtype)
    found = add_rms_norm(rows.clone(), None, torch.ones(40, dtype=dtype), 1e-6)
    assert_rounded_once(found, reference.rms_norm(rows.double(), torch.ones(40).double(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 13, 48, 1536])
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows + width)
    gate_up = (torch.randn(rows, 2 * width) * 5).to(dtype)
    found = silu_mul(gate_up)
    assert found.shape == (rows, width)
    assert_rounded_once(found, reference.silu_mul(gate_up.double()))


def test_silu_of_extremes() -> None:
    gate = torch.tensor([0.0, -0.0, 80.0, -80.0, 1e30, -1e30, 3e38, -3e38, 1e-38, math.inf, math.nan, 20.0])
    found = silu_mul(torch.cat([gate, torch.ones(12)])[None])[0]
    torch.testing.assert_close(found, F.silu(gate), rtol=1e-6, atol=1e-37, equal_nan=True)


def rotary(tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.randn(tokens, 1, dim // 2, dtype=torch.float64) * 100
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["", "qk", "k"])
@pytest.mark.parametrize(("query_heads", "kv_heads", "dim"), [(9, 3, 64), (1, 1, 8), (4, 2, 40), (6, 1, 128)])
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_rotate_and_store(
    tokens: int, query_heads: int, kv_heads: int, dim: int, norm: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens + dim)
    page, pages = 4, 9
    qkv = torch.randn(tokens, (query_heads + 2 * kv_heads) * dim).to(dtype)
    slots = torch.randperm(page * pages)[:tokens]
    weights = [torch.randn(dim).to(dtype) if name in norm else None for name in "qk"]
    for angle_dtype in {dtype, torch.float32}:
        cos, sin = rotary(tokens, dim, angle_dtype)
        keys, values = torch.randn(2, pages, page, kv_heads, dim).to(dtype)
        exact_keys, exact_values = keys.double(), values.double()
        exact = reference.rotate_and_store(
            qkv.double(),
            cos.double(),
            sin.double(),
            slots,
            exact_keys,
            exact_values,
            *(None if w is None else w.double() for w in weights),
            eps=1e-5,
        )
        untouched = torch.ones(page * pages, dtype=torch.bool).index_fill_(0, slots, False)
        before = keys.flatten(0, 1)[untouched].clone()
        found = rotate_and_store(qkv, cos, sin, slots, keys, values, *weights, eps=1e-5)
        assert found.shape == (tokens, query_heads, dim)
        assert found.dtype == dtype
        assert_rounded_once(found, exact)
        assert_rounded_once(keys, exact_keys)
        assert torch.equal(values.double(), exact_values)
        assert torch.equal(keys.flatten(0, 1)[untouched], before)


def test_rotates_as_the_model_does() -> None:
    qkv = torch.randn(11, 5 * 16)
    cos, sin = rotary(11, 16, torch.float32)
    keys, values = torch.zeros(2, 3, 4, 1, 16)
    found = rotate_and_store(qkv, cos, sin, torch.arange(11), keys, values)
    heads = qkv.view(11, 5, 16)
    torch.testing.assert_close(found, rotate(heads[:, :3], cos, sin))
    torch.testing.assert_close(keys.flatten(0, 1)[:11], rotate(heads[:, 3:4], cos, sin))
    assert torch.equal(values.flatten(0, 1)[:11], heads[:, 4:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_row_stays_alone(poison: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)

    def of_all_rows(x: Tensor) -> list[Tensor]:
        keys, values = torch.zeros(2, 2, 3, 2, 8, dtype=dtype)
        slots = torch.tensor([4, 1, 0, 5, 2])
        query = rotate_and_store(x, cos, sin, slots, keys, values, weight[:8], weight[:8])
        stored = [p.flatten(0, 1)[slots] for p in (keys, values)]
        return [add_rms_norm(x.clone(), x, weight, 1e-5), silu_mul(x), query, *stored]

    x, weight = torch.randn(5, 48).to(dtype), torch.randn(48).to(dtype)
    cos, sin = rotary(5, 8, dtype)
    bad = x.clone()
    bad[2] = poison
    others = [0, 1, 3, 4]
    for clean, poisoned in zip(of_all_rows(x), of_all_rows(bad), strict=True):
        assert torch.equal(clean[others], poisoned[others])
        assert not poisoned[2].isfinite().all()


def test_strided_inputs() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(5, 48), torch.randn(48)
    cos, sin = rotary(5, 8, torch.float32)
    slots = torch.tensor([4, 1, 0, 5, 2])
    wide = torch.randn(5, 60)
    wide[:, 5:53] = x
    spread = torch.randn(5, 96)
    spread[:, ::2] = x
    pages = torch.zeros(2, 3, 2, 8, 2)
    keys, values = pages[..., 0].contiguous(), pages[..., 0].contiguous()
    query = rotate_and_store(x, cos, sin, slots, keys, values)
    normed = add_rms_norm(x.clone(), x, weight, 1e-5)
    for view in (wide[:, 5:53], spread[:, ::2], x.t().contiguous().t()):
        assert silu_mul(view).allclose(silu_mul(x), rtol=1e-6)
        assert add_rms_norm(x.clone(), view, weight, 1e-5).allclose(normed, rtol=1e-6)
        # Pages of other layouts: heads outside slots, and one layer of a stack.
        other_keys, other_values = torch.zeros(2, 2, 3, 8).transpose(1, 2), torch.zeros(2, 4, 3, 2, 8)[:, 1]
        assert torch.equal(rotate_and_store(view, cos, sin, slots, other_keys, other_values), query)
        assert torch.equal(other_keys, keys)
        assert torch.equal(other_values, values)
    residual = wide[:, 5:53]
    assert add_rms_norm(residual, x, weight, 1e-5).allclose(normed, rtol=1e-6)
    assert torch.equal(residual, x + x)
    with pytest.raises(ValueError, match="contiguous"):
        add_rms_norm(spread[:, ::2], x, weight, 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        rotate_and_store(x, cos, sin, slots, pages[..., 0], values)


def test_threads_change_nothing(path: str) -> None:
    if path == "gpu":
        pytest.skip("threads of the CPU")
    x, weight = torch.randn(900, 480), torch.randn(480)
    cos, sin = rotary(900, 16, torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            keys, values = torch.zeros(2, 57, 16, 5, 16)
            query = rotate_and_store(x, cos, sin, torch.arange(900), keys, values)
            found.append([query, keys, values, silu_mul(x), add_rms_norm(x.clone(), x, weight, 1e-5)])
    finally:
        torch.set_num_threads(threads)
    for one, many in zip(*found, strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("slot", [-1, 12, 2**40])
def test_a_slot_outside_the_cache(slot: int, path: str) -> None:
    if path == "gpu":
        pytest.skip("on a GPU the check would wait for the device")
    keys, values = torch.zeros(2, 3, 4, 1, 8)
    cos, sin = rotary(2, 8, torch.float32)
    with pytest.raises(IndexError, match=r"outside the cache's \[0, 11\]"):
        rotate_and_store(torch.ones(2, 24), cos, sin, torch.tensor([1, slot]), keys, values)
    assert keys.count_nonzero() == 0


def test_bad_arguments() -> None:
    x, weight = torch.zeros(2, 24), torch.zeros(24)
    cos, sin = rotary(2, 8, torch.float32)
    slots, pages = torch.tensor([0, 1]), torch.zeros(3, 4, 1, 8)
    good: dict[str, Any] = {"qkv": x, "cos": cos, "sin": sin, "slots": slots, "key_pages": pages}
    good["value_pages"] = pages.clone()
    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, "dtype", lambda: add_rms_norm(x, x.double(), weight, 1e-5)),
        (TypeError, "dtype", lambda: add_rms_norm(x, x, weight.bfloat16(), 1e-5)),
        (TypeError, "dtype", lambda: add_rms_norm(x.bfloat16(), None, weight, 1e-5)),
        (TypeError, "dtype", lambda: add_rms_norm(x.double(), None, weight.bfloat16(), 1e-5)),
        (ValueError, "one shape", lambda: add_rms_norm(x, x[:1], weight, 1e-5)),
        (ValueError, r"weight \[24\]", lambda: add_rms_norm(x, x, weight[:5], 1e-5)),
        (TypeError, "floating", lambda: silu_mul(x.long())),
        (ValueError, "2I", lambda: silu_mul(x[:, :5])),
        (TypeError, "dtype", lambda: rotate_and_store(**{**good, "key_pages": pages.double()})),
        (TypeError, "cos and sin", lambda: rotate_and_store(**{**good, "cos": cos.double()})),
        (TypeError, "int64", lambda: rotate_and_store(**{**good, "slots": slots.int()})),
        (ValueError, "need qkv", lambda: rotate_and_store(**{**good, "value_pages": pages[:2]})),
        (ValueError, "does not hold", lambda: rotate_and_store(**{**good, "qkv": x[:, :16]})),
        (ValueError, "need cos", lambda: rotate_and_store(**{**good, "cos": cos[:, 0]})),
        (ValueError, "need cos", lambda: rotate_and_store(**{**good, "slots": slots[:1]})),
        (ValueError, "q_norm_weight", lambda: rotate_and_store(**good, q_norm_weight=weight)),
    ]
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.skipif(not COMPILED, reason="the compiled library is not built")
@pytest.mark.parametrize("rows", [0, 3])
def test_opcheck(rows: int) -> None:
    ops = torch.ops.metareward
    x, weight = torch.randn(rows, 48), torch.randn(48)
    cos, sin = rotary(rows, 8, torch.float32)
    keys, values = torch.zeros(2, 2, 3, 1, 8)
    stored = (x, cos, sin, torch.arange(rows), keys, values)
    torch.library.opcheck(ops.add_rms_norm_cpp_.default, (x.clone(), x, weight, 1e-5))
    torch.library.opcheck(ops.add_rms_norm_cpp_.default, (x.bfloat16(), None, weight.bfloat16(), 1e-5))
    narrow = (x.clone(), x.bfloat16(), weight.bfloat16(), 1e-5)
    torch.library.opcheck(ops.add_rms_norm_cpp_.default, narrow)
    torch.library.opcheck(ops.rotate_and_store_cpp_.default, (*stored, None, None, 1e-5))
    torch.library.opcheck(ops.rotate_and_store_cpp_.default, (*stored, weight[:8], weight[:8], 1e-5))
    torch.library.opcheck(ops.silu_mul_cpp.default, (x,))
    torch.library.opcheck(ops.silu_mul_cpp.default, (torch.randn(rows, 60)[:, 6:54],))
