"""linear_fp32 and packed_bf16_linear: fp32 sums of bf16 products against the fp64 reference, whatever the shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from metareward_kernels import implementation, linear_fp32, pack_bf16_weight, packed_bf16_linear, reference
from torch import Tensor

COMPILED = implementation("linear_fp32") == "cpp"
needs_kernel = pytest.mark.skipif(not COMPILED, reason="no compiled library, or a CPU without AVX-512 BF16")
SHAPES = [(T, N, K) for T in (0, 1, 9, 70) for N in (1, 48, 131) for K in (1, 2, 37, 576)]


@pytest.fixture(params=["cpp", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("METAREWARD_KERNELS", raising=False)
    if request.param == "cpp" and not COMPILED:
        pytest.skip("no compiled library, or a CPU without AVX-512 BF16")
    if request.param == "torch":
        monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    return request.param


def make(tokens: int, rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 1000 + rows + width)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)


def assert_fp32_sums(found: Tensor, x: Tensor, weight: Tensor) -> None:
    """Within what fp32 sums of K terms in any order may be off: K roundings of the sum of magnitudes."""
    exact = reference.linear_fp32(x.double(), weight.double())
    bound = x.double().abs() @ weight.double().abs().T * x.shape[1] * 2.0**-24
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= bound).all()


def variants(x: Tensor, weight: Tensor, path: str) -> list[Tensor]:
    found = [linear_fp32(x, weight)]
    if path == "cpp" and x.dtype == torch.bfloat16:
        packed = pack_bf16_weight(weight)
        found.append(linear_fp32(x, weight, packed=packed))
        found.append(packed_bf16_linear(x, packed, weight.shape[0], dtype=torch.float32))
    return found


@pytest.mark.parametrize(("tokens", "rows", "width"), SHAPES)
def test_sums_are_fp32(tokens: int, rows: int, width: int, path: str) -> None:
    x, weight = make(tokens, rows, width)
    found = variants(x, weight, path)
    for one in found:
        assert_fp32_sums(one, x, weight)
        assert torch.equal(one, found[0])


@pytest.mark.parametrize(("tokens", "rows", "width"), [(33, 5000, 64), (530, 96, 1025), (16, 100, 2048)])
def test_several_blocks_of_the_cache(tokens: int, rows: int, width: int, path: str) -> None:
    x, weight = make(tokens, rows, width)
    for one in variants(x, weight, path):
        assert_fp32_sums(one, x, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x, weight = make(5, 77, 40, dtype)
    found = linear_fp32(x, weight)
    if dtype == torch.float64:
        assert torch.equal(found, reference.linear_fp32(x, weight))
    else:
        assert_fp32_sums(found, x, weight)


def test_empty_width() -> None:
    x, weight = make(3, 50, 0)
    assert torch.equal(linear_fp32(x, weight), torch.zeros(3, 50))


@needs_kernel
@pytest.mark.parametrize(("tokens", "rows", "width"), SHAPES[::5])
def test_bf16_results_are_the_fp32_sums_rounded_once(tokens: int, rows: int, width: int) -> None:
    x, weight = make(tokens, rows, width)
    with pytest.MonkeyPatch.context() as free:
        free.delenv("METAREWARD_KERNELS", raising=False)
        packed = pack_bf16_weight(weight)
    assert torch.equal(
        packed_bf16_linear(x, packed, rows),
        packed_bf16_linear(x, packed, rows, dtype=torch.float32).bfloat16(),
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_stays_in_its_row_and_column(poison: float, path: str) -> None:
    x, weight = make(19, 101, 37)
    bad_x, bad_weight = x.clone(), weight.clone()
    bad_x[7, 36] = poison
    bad_weight[53, 36] = poison
    for clean, found in zip(variants(x, weight, path), variants(bad_x, bad_weight, path), strict=True):
        others = torch.ones(19, 101, dtype=torch.bool)
        others[7], others[:, 53] = False, False
        assert torch.equal(clean[others], found[others])
        assert not found[~others].isfinite().any()


def test_strided_inputs(path: str) -> None:
    x, weight = make(19, 101, 38)
    plain = linear_fp32(x, weight)
    for width in (40, 1024):  # 1024: rows a multiple of 2 KB apart
        wide_x = torch.full((19, width), math.nan, dtype=torch.bfloat16)
        wide_x[:, 1:39] = x
        wide_weight = torch.full((101, width), math.nan, dtype=torch.bfloat16)
        wide_weight[:, 1:39] = weight
        for one in variants(wide_x[:, 1:39], wide_weight[:, 1:39], path):
            assert torch.equal(one, plain)
    for one in variants(x.T.contiguous().T, weight.T.contiguous().T, path):
        assert_fp32_sums(one, x, weight)
    for one in variants(x[:1].expand(19, 38), weight, path):
        assert_fp32_sums(one, x[:1].expand(19, 38), weight)


@pytest.mark.parametrize("spare", [0, 3, 16])
def test_out_is_written_and_nothing_beside_it(spare: int, path: str) -> None:
    x, weight = make(19, 101, 37)
    whole = torch.full((21, 101 + spare), 7.0)
    out = whole[1:20, :101]
    for call in [lambda out: linear_fp32(x, weight, out=out)] + (
        [lambda out: linear_fp32(x, weight, packed=pack_bf16_weight(weight), out=out)]
        if path == "cpp"
        else []
    ):
        out.fill_(math.nan)
        assert call(out) is out
        assert_fp32_sums(out, x, weight)
        out.fill_(7.0)
        assert (whole == 7.0).all()


@needs_kernel
def test_a_row_depends_on_nothing_beside_it_and_threads_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("METAREWARD_KERNELS", raising=False)
    threads = torch.get_num_threads()
    for shape in ((150, 1000, 129), (300, 96, 576)):  # many tiles; few, so that the rows are shared out
        x, weight = make(*shape)
        expected = torch.cat([linear_fp32(row[None], weight) for row in x])
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                for one in variants(x, weight, "cpp"):
                    assert torch.equal(one, expected)
        finally:
            torch.set_num_threads(threads)


def test_bad_arguments(path: str) -> None:
    x, weight = make(3, 50, 8)
    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, "one floating dtype", lambda: linear_fp32(x.float(), weight)),
        (TypeError, "one floating dtype", lambda: linear_fp32(x.int(), weight.int())),
        (ValueError, r"need x \[T,K\]", lambda: linear_fp32(x[:, :7], weight)),
        (ValueError, r"need x \[T,K\]", lambda: linear_fp32(x[0], weight)),
        (ValueError, r"out must be float32 \[3,50\]", lambda: linear_fp32(x, weight, out=torch.empty(3, 49))),
        (ValueError, "out must be float32", lambda: linear_fp32(x, weight, out=torch.empty(3, 50).half())),
        (ValueError, "contiguous", lambda: linear_fp32(x, weight, out=torch.empty(50, 3).T)),
        (ValueError, "overlap", lambda: linear_fp32(x, weight, out=torch.empty(50).expand(3, 50))),
        (TypeError, "must be bfloat16", lambda: pack_bf16_weight(weight.float())),
        (ValueError, r"need weight \[N,K\]", lambda: pack_bf16_weight(weight[0])),
    ]
    if path == "cpp":
        packed = pack_bf16_weight(weight)
        calls += [
            (ValueError, "does not fit", lambda: packed_bf16_linear(x[:, :6], packed, 50)),
            (ValueError, "does not fit", lambda: packed_bf16_linear(x, packed, 48)),
            (ValueError, "does not fit", lambda: linear_fp32(x, weight[:40], packed=packed)),
            (TypeError, "x must be bfloat16", lambda: packed_bf16_linear(x.float(), packed, 50)),
            (TypeError, "x must be bfloat16", lambda: packed_bf16_linear(x, packed, 50, dtype=torch.float16)),
            (ValueError, "out must be", lambda: packed_bf16_linear(x, packed, 50, out=torch.empty(2, 50))),
        ]
    else:
        calls.append((RuntimeError, "AVX-512 BF16", lambda: pack_bf16_weight(weight)))
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()


@needs_kernel
@pytest.mark.parametrize(("tokens", "rows", "width"), [(0, 5, 4), (3, 50, 7), (3, 0, 4)])
def test_opcheck(tokens: int, rows: int, width: int) -> None:
    ops = torch.ops.metareward
    x, weight = make(tokens, rows, width)
    packed = ops.pack_bf16_weight_cpp(weight)
    torch.library.opcheck(ops.pack_bf16_weight_cpp.default, (weight,))
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.zeros(tokens, rows, dtype=dtype)
        torch.library.opcheck(ops.packed_linear_cpp_.default, (x, packed, out))
        torch.library.opcheck(ops.bf16_linear_cpp_.default, (x, weight, out))
