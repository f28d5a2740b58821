"""The CUDA kernels of head_rows: offsets, one launch for log-probs and residual, targets outside, and deliberate mistakes.

The CUDA kernels run compiled for the CPU; themselves, and the Triton ones, only where there is a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from metareward_kernels import cuda_head_rows

from tests.cuda_on_cpu import compiled
from tests.kernels import test_head_rows
from tests.kernels.row_checks import (
    HALVES,
    TOLERANCE,
    Rows,
    exact,
    moved,
    nasty,
)


def test_cuda_offsets_beyond_2_to_the_31(cuda_on_cpu: compiled.CudaOnCpu) -> None:
    vocabulary = 50257
    count = 2**31 // vocabulary + 3  # the last two rows begin beyond element 2^31
    logits = torch.empty(
        count, vocabulary, dtype=torch.bfloat16
    )  # 4 GiB of addresses, of which little is touched
    logits[-2:] = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(4))
    targets = torch.zeros(count, dtype=torch.int64)
    targets[-2:] = torch.tensor([vocabulary - 1, 17])
    lse, coefficient = torch.zeros(count), torch.ones(count)
    right = exact(logits[-2:], targets[-2:], 1.0, torch.ones(2))
    try:
        cuda_on_cpu.start_at(count - 2)
        found = cuda_on_cpu.logprob_rows(logits, targets)
        torch.testing.assert_close(found.logprobs[-2:].double(), right.logprobs, rtol=1e-5, atol=3e-5)
        assert (found.logprobs[:-2] == 12345.0).all()  # the others were not run
        lse[-2:] = found.lse[-2:]
        blocks = math.ceil(vocabulary / (8 * 4 * 256))
        cuda_on_cpu.start_at((count - 2) * blocks)
        cuda_on_cpu.logit_gradient_rows_(logits, targets, lse, coefficient)
    finally:
        cuda_on_cpu.start_at(0)
    torch.testing.assert_close(logits[-2:].double(), right.gradient, rtol=2**-7, atol=1e-7)


@pytest.fixture(params=["on a cpu", *(["on a gpu"] if torch.cuda.is_available() else [])])
def cuda_residual(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """softmax_residual_rows_ of cuda_head_rows."""
    if request.param == "on a cpu":
        return request.getfixturevalue("cuda_on_cpu").softmax_residual_rows_
    if cuda_head_rows.load_library() is not None:
        pytest.skip(str(cuda_head_rows.load_library()))
    return moved(cuda_head_rows.softmax_residual_rows_)


@pytest.mark.parametrize(("vocabulary", "temperature"), [(1, 0.7), (7, 1.0), (1280, 1.3), (50257, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_cuda_logprobs_and_residual_in_one_launch(
    cuda_residual: Callable[..., Any], dtype: torch.dtype, vocabulary: int, temperature: float
) -> None:
    logits, targets = nasty(vocabulary, dtype)
    right = exact(logits, targets, temperature, torch.full((8,), 3.0 * temperature))
    for out_dtype in [None] if dtype != torch.float32 else [None, *HALVES]:
        entropy = out_dtype is None
        given = logits.clone()
        out = None if out_dtype is None else torch.full_like(given, math.nan, dtype=out_dtype)
        found = cuda_residual(given, targets, temperature, entropy, out, 3.0)
        for ours, true in zip(found[: 2 + entropy], right[: 2 + entropy], strict=True):
            torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=3e-5)
        assert (found[0] <= 0).all()
        residual = given if out is None else out
        error = (residual.double() - right.gradient).abs()
        rounding = TOLERANCE[residual.dtype] * right.gradient.abs()
        assert (error <= rounding + 3.0 * (2e-6 * right.p + 1e-7)).all()
        if out is not None:
            assert torch.equal(given, logits)


@pytest.mark.parametrize("vocabulary", [5, 1003, 9000])
def test_cuda_residual_stays_within_its_rows(cuda_on_cpu: compiled.CudaOnCpu, vocabulary: int) -> None:
    around = torch.full((2 * vocabulary + 67,), math.nan, dtype=torch.bfloat16)
    logits = around[3 : 3 + 2 * vocabulary].view(2, vocabulary)
    logits.copy_(torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(5)))
    targets = torch.tensor([vocabulary - 1, -1])  # the second is not in the vocabulary
    right = exact(logits[:1].clone(), targets[:1], 1.0, torch.ones(1))
    found = cuda_on_cpu.softmax_residual_rows_(logits, targets)
    torch.testing.assert_close(found.logprobs[:1].double(), right.logprobs, rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(logits[:1].double(), right.gradient, rtol=2**-7, atol=1e-6)
    assert found.logprobs[1].isnan()
    assert logits[1].isnan().all()
    assert around[:3].isnan().all()
    assert around[3 + 2 * vocabulary :].isnan().all()


@pytest.mark.parametrize("target", [-1, -100, 1003, 2**40])
def test_cuda_target_outside_the_vocabulary_is_nan(cuda_on_cpu: compiled.CudaOnCpu, target: int) -> None:
    logits, targets = torch.randn(2, 1003), torch.tensor([5, target])
    found = cuda_on_cpu.logprob_rows(logits, targets)
    assert found.logprobs.isnan().tolist() == [False, True]
    gradient = cuda_on_cpu.logit_gradient_rows_(logits, targets, found.lse, torch.ones(2))
    assert gradient.isfinite().all(dim=1).tolist() == [True, False]
    assert gradient[1].isnan().all()


MISTAKES = {
    "the maximum starts at 0": (
        "Sums own = {minus_infinity(), 0.0f, 0.0f};",
        "Sums own = {0.0f, 0.0f, 0.0f};",
    ),
    "the tail is not read": ("if (thread < head + tail) {  // fewer", "if (thread < head) {  // fewer"),
    "a step too few between warps": (
        "own = lane < WARPS ? of_warp[lane]",
        "own = lane < WARPS - 1 ? of_warp[lane]",
    ),
    "the entropy does not follow the maximum": (
        "of.weighted = (of.weighted + of.sum * step) * decay;",
        "of.weighted = of.weighted * decay;",
    ),
    "the gradient's column is off at the head": (
        "gradient(values[u], head + at * PACK,",
        "gradient(values[u], at * PACK,",
    ),
    "the tail's gradient is not written": ("part == 0 && thread < head + tail", "part == 0 && thread < head"),
}


def check_all(rows: Rows) -> None:
    test_head_rows.test_nasty_rows(rows, torch.float32, 9003, 1.0)
    test_head_rows.test_nothing_outside_the_rows_is_read_or_written(rows, torch.float32, 1, 9003)


def test_what_finds_mistakes_passes_without_one(cuda_on_cpu: compiled.CudaOnCpu) -> None:
    check_all(Rows("cuda on a cpu", cuda_on_cpu.logprob_rows, cuda_on_cpu.logit_gradient_rows_))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_cuda_kernel_is_found(mistake: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if compiled.missing is not None:
        pytest.skip(compiled.missing)
    wrong = compiled.CudaOnCpu(tmp_path_factory.mktemp("mistake"), MISTAKES[mistake])
    rows = Rows(mistake, wrong.logprob_rows, wrong.logit_gradient_rows_)
    with pytest.raises(AssertionError):
        check_all(rows)
