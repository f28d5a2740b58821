"""head_rows: values, gradients, bounds and offsets, in every implementation that runs here.

The CUDA kernels run compiled for the CPU; themselves, and the Triton ones, only where there is a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from metareward_kernels import cuda_head_rows, dispatch, head_rows, implementation
from torch import Tensor

from tests.cuda_on_cpu import compiled
from tests.on_gpu import run_on_gpu

HALVES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # of gradients, relative
EVERYWHERE = ("torch", "cpp", "cuda on a cpu")
ON_GPU = ("torch on a gpu", "triton", "cuda") if torch.cuda.is_available() else ()


class Rows(NamedTuple):
    """An implementation of head_rows; tensors on the CPU go in and come out."""

    name: str
    logprobs: Callable[..., Any]
    gradient: Callable[..., Tensor]


def moved(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on the GPU; of what it returns, the fields that are not None."""

    def present(*arguments: Any) -> Any:
        found = function(*arguments)
        return found if isinstance(found, Tensor) else tuple(part for part in found if part is not None)

    return lambda *arguments: run_on_gpu(present, *arguments)


@pytest.fixture(scope="module")
def cuda_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> compiled.CudaOnCpu:
    if compiled.missing is not None:
        pytest.skip(compiled.missing)
    return compiled.CudaOnCpu(tmp_path_factory.mktemp("cuda-on-cpu"))


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


def takes(rows: Rows, dtype: torch.dtype) -> None:
    if rows.name == "cpp" and dtype == torch.float16:
        pytest.skip("the compiled op takes float32 and bfloat16")


def nasty(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of logits that have broken other kernels, and a target of each."""
    generator = torch.Generator().manual_seed(vocabulary)
    noise = torch.randn(8, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (8,), generator=generator)
    logits = torch.stack(
        [
            3.0 * noise[0],
            torch.zeros(vocabulary),
            -100.0 + 0.5 * noise[2],  # a maximum that starts at 0 would underflow
            noise[3],
            noise[4],
            noise[5],
            noise[6].masked_fill(torch.arange(vocabulary) % 3 == 1, -math.inf),
            20.0 * noise[7],
        ]
    )
    logits[3, -1] = 80.0  # in the last, partial tile; the target is it
    targets[3] = vocabulary - 1
    logits[4, vocabulary // 2] = 80.0  # the target is another, where there is one
    targets[4] = 0
    targets[6] = 0
    if vocabulary > 1:
        logits[5, targets[5]] = -math.inf  # the target is masked: log p = -inf
    return logits.to(dtype), targets


class Exact(NamedTuple):
    logprobs: Tensor
    lse: Tensor
    entropy: Tensor
    gradient: Tensor
    p: Tensor


def exact(logits: Tensor, targets: Tensor, temperature: float, coefficient: Tensor) -> Exact:
    """In fp64, from the rounded logits."""
    scaled = logits.double() / temperature
    logprobs = scaled.log_softmax(dim=1)
    p = logprobs.exp()
    onehot = torch.zeros_like(p).scatter_(1, targets[:, None], 1.0)
    return Exact(
        logprobs.gather(1, targets[:, None]).squeeze(1),
        scaled.logsumexp(dim=1),
        -(p * logprobs.nan_to_num(neginf=0.0)).sum(dim=1),
        (coefficient / temperature).double()[:, None] * (onehot - p),
        p,
    )


def check_logprobs(rows: Rows, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Compare with fp64; returns the log-sum-exps."""
    right = exact(logits, targets, temperature, torch.ones(len(targets)))
    found = rows.logprobs(logits, targets, temperature, True)
    for ours, true in zip(found, right[:3], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=3e-5)
    assert (found[0] <= 0).all()
    without = rows.logprobs(logits, targets, temperature, False)
    assert torch.equal(without[0], found[0])
    assert torch.equal(without[1], found[1])
    return found[1]


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
    test_nasty_rows(rows, torch.float32, 9003, 1.0)
    test_nothing_outside_the_rows_is_read_or_written(rows, torch.float32, 1, 9003)


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
