"""head_rows: values, gradients, bounds and offsets, in every implementation that runs here.

The CUDA kernels run compiled for the CPU; themselves, and the Triton ones, only where there is a GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from metareward_kernels import cuda_head_rows, dispatch, head_rows, implementation

from tests.kernels.row_checks import (
    EVERYWHERE,
    HALVES,
    ON_GPU,
    TOLERANCE,
    Rows,
    check_logprobs,
    exact,
    moved,
    nasty,
    takes,
)


@pytest.fixture(params=EVERYWHERE + ON_GPU)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rows:
    name = request.param
    if name == "cuda on a cpu":
        cuda = request.getfixturevalue("cuda_on_cpu")
        return Rows(name, cuda.logprob_rows, cuda.logit_gradient_rows_)
    if name == "cpp" and implementation("head_rows") != "cpp":
        pytest.skip("the compiled library is not built")
    if name == "triton" and "head_rows" not in dispatch.TRITON_OPS:
        pytest.skip("head_rows has no Triton kernel")
    if name == "cuda" and cuda_head_rows.load_library() is not None:
        pytest.skip(str(cuda_head_rows.load_library()))
    monkeypatch.setenv("METAREWARD_KERNELS", name.split()[0])
    if name in ON_GPU:
        return Rows(name, moved(head_rows.logprob_rows), moved(head_rows.logit_gradient_rows_))
    return Rows(name, head_rows.logprob_rows, head_rows.logit_gradient_rows_)


@pytest.mark.parametrize(
    ("vocabulary", "temperature"), [(1, 0.7), (7, 1.0), (1280, 1.0), (1280, 0.7), (50257, 0.7)]
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_nasty_rows(rows: Rows, dtype: torch.dtype, vocabulary: int, temperature: float) -> None:
    takes(rows, dtype)
    logits, targets = nasty(vocabulary, dtype)
    lse = check_logprobs(rows, logits, targets, temperature)
    coefficient = torch.tensor([1.0, -0.3, 2.0, 1e-3, -5.0, 0.7, 0.0, 1.5])  # one of its own for every row
    right = exact(logits, targets, temperature, coefficient)
    bound = coefficient.abs()[:, None] / temperature
    outs = [None] if dtype != torch.float32 else [None, *HALVES]
    for out_dtype in outs:
        takes(rows, out_dtype or dtype)
        given = logits.clone()
        out = None if out_dtype is None else torch.full_like(given, math.nan, dtype=out_dtype)
        found = rows.gradient(given, targets, lse, coefficient, temperature, out)
        assert torch.equal(found, given if out is None else out)
        if out is not None:
            assert torch.equal(given, logits)
        error = (found.double() - right.gradient).abs()
        # Rounding of the result, and of exp(x - lse) with an lse of 80 / 0.7 in fp32.
        rounding = TOLERANCE[found.dtype] * right.gradient.abs()
        assert (error <= rounding + (3e-5 * right.p + 1e-7) * bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, -100.0, 1e4])
def test_never_above_zero(rows: Rows, dtype: torch.dtype, offset: float) -> None:
    logits = (torch.randn(64, 1001, generator=torch.Generator().manual_seed(1)) * 8 + offset).to(dtype)
    logprobs = rows.logprobs(logits, logits.argmax(dim=1), 0.9, False)[0]
    assert (logprobs <= 0).all()
    if offset < 1000 or dtype == torch.float32:  # bf16 has steps of 64 there
        assert (logprobs > -1.0).any()  # some rows are nearly certain, where rounding could overshoot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_targets_column_is_formed_before_it_is_rounded(rows: Rows, dtype: torch.dtype) -> None:
    # p = 1 - 8e-4: in bf16 the step below 1 is 2^-8, so that 1 - p of a rounded p would be 0 or 0.004.
    logits = torch.zeros(1, 1001)
    logits[0, 3] = 14.0
    logits = logits.to(dtype)
    out = torch.empty(1, 1001, dtype=torch.bfloat16) if dtype == torch.float32 else None
    targets, one = torch.tensor([3]), torch.ones(1)
    right = exact(logits, targets, 1.0, one).gradient[0, 3]
    lse = rows.logprobs(logits, targets, 1.0, False)[1]
    found = rows.gradient(logits, targets, lse, one, 1.0, out)[0, 3]
    assert 0.0007 < right < 0.0009
    assert abs(found.double() - right) < 0.01 * right


def test_rows_without_a_distribution_are_nan(rows: Rows) -> None:
    logits, targets = torch.randn(5, 1003), torch.arange(5)
    good = rows.logprobs(logits, targets, 1.0, True)
    logits[1] = -math.inf
    logits[2, 700] = math.inf
    logits[3, 1002] = math.nan
    found = rows.logprobs(logits, targets, 1.0, True)
    for before, now in zip(good, found, strict=True):
        assert now[1:4].isnan().all()
        assert torch.equal(now[::4], before[::4])
    gradient = rows.gradient(logits, targets, found[1], torch.ones(5), 1.0, None)
    assert gradient[1:4].isnan().all()
    assert gradient[::4].isfinite().all()


def test_no_rows(rows: Rows) -> None:
    if rows.name == "cuda on a cpu":
        pytest.skip("csrc/cuda/ops.cpp does not launch for no rows")
    none, targets = torch.empty(0, 9), torch.empty(0, dtype=torch.int64)
    assert [part.shape for part in rows.logprobs(none, targets, 1.0, True)] == [(0,)] * 3
    assert rows.gradient(none, targets, torch.empty(0), torch.empty(0), 1.0, None).shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("offset", "vocabulary"), [(0, 1003), (1, 1003), (3, 5), (5, 1024), (8, 1280), (7, 40000)]
)
def test_nothing_outside_the_rows_is_read_or_written(
    rows: Rows, dtype: torch.dtype, offset: int, vocabulary: int
) -> None:
    if "gpu" in rows.name or rows.name in ON_GPU:
        pytest.skip("memory that is copied to the GPU has no surroundings")
    takes(rows, dtype)
    count = 3
    around = torch.full((offset + count * vocabulary + 64,), math.nan, dtype=dtype)
    inside = slice(offset, offset + count * vocabulary)
    logits = around[inside].view(count, vocabulary)
    logits.copy_(torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(3)))
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2])
    lse = check_logprobs(rows, logits, targets, 1.3)  # NaN if anything else is read
    right = exact(logits, targets, 1.3, torch.ones(count)).gradient
    if dtype == torch.float32:
        out_around = torch.full((offset + count * vocabulary + 64,), math.nan, dtype=torch.bfloat16)
        out = out_around[inside].view(count, vocabulary)
        rows.gradient(logits, targets, lse, torch.ones(count), 1.3, out)
        torch.testing.assert_close(out.double(), right, rtol=2**-8, atol=1e-6)
        assert out_around[:offset].isnan().all()
        assert out_around[inside.stop :].isnan().all()
    rows.gradient(logits, targets, lse, torch.ones(count), 1.3, None)
    torch.testing.assert_close(logits.double(), right, rtol=4 * TOLERANCE[dtype], atol=1e-6)
    assert around[:offset].isnan().all()
    assert around[inside.stop :].isnan().all()


def test_a_rerun_is_bitwise_equal(rows: Rows) -> None:
    logits, targets = nasty(1280, torch.float32)
    first, second = (rows.logprobs(logits, targets, 0.8, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    coefficient = torch.randn(8, generator=torch.Generator().manual_seed(2))
    one, two = (rows.gradient(logits.clone(), targets, first[1], coefficient, 0.8, None) for _ in range(2))
    assert torch.equal(one, two)


def test_a_row_does_not_depend_on_the_others(rows: Rows) -> None:
    if rows.name.startswith("torch"):
        pytest.skip("PyTorch splits its sums by the number of rows")
    logits, targets = nasty(1280, torch.float32)
    together = rows.logprobs(logits, targets, 0.8, True)
    for i in range(8):
        alone = rows.logprobs(logits[i : i + 1].clone(), targets[i : i + 1], 0.8, True)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("which", ["triton", "cuda"])
def test_offsets_beyond_2_to_the_31_on_a_gpu(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if which == "triton" and "head_rows" not in dispatch.TRITON_OPS:
        pytest.skip("head_rows has no Triton kernel")
    if which == "cuda" and cuda_head_rows.load_library() is not None:
        pytest.skip(str(cuda_head_rows.load_library()))
    monkeypatch.setenv("METAREWARD_KERNELS", which)
    vocabulary = 128256
    count = 2**31 // vocabulary + 3
    logits = torch.zeros(count, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-2:] = torch.randn(2, vocabulary, device="cuda")
    targets = torch.full((count,), vocabulary - 1, device="cuda")
    right = exact(logits[-2:].cpu(), targets[-2:].cpu(), 1.0, torch.ones(2))
    found = head_rows.logprob_rows(logits, targets)
    torch.testing.assert_close(found.logprobs[-2:].double().cpu(), right.logprobs, rtol=1e-5, atol=3e-5)
    head_rows.logit_gradient_rows_(logits, targets, found.lse, torch.ones(count, device="cuda"))
    torch.testing.assert_close(logits[-2:].double().cpu(), right.gradient, rtol=2**-7, atol=1e-7)
