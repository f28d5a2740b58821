"""The head's Triton kernels in the interpreter against fp64: row passes, fused log-probs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from metareward_kernels import linear_logprob, reference, triton_head_rows, triton_linear_logprob
from metareward_kernels.head_rows import logit_gradient_rows_, logprob_rows
from metareward_kernels.triton_head_tiles import Tuning
from metareward_kernels.triton_linear_logprob import linear_logprob_backward_triton, linear_logprob_triton
from torch import Tensor

Run = Callable[..., Any]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", "triton")


def nasty_rows(vocabulary: int, dtype: torch.dtype) -> Tensor:
    """[7,V]: random, flat, all near -100, one at +80, one at -100 below a flat rest, masked entries, all but one
    masked.
    """
    generator = torch.Generator().manual_seed(vocabulary)
    rows = torch.randn(7, vocabulary, generator=generator) * 3
    rows[1] = 0.5
    rows[2] -= 100.0
    rows[3] = 0.0
    rows[3, vocabulary // 2] = 80.0
    rows[4] = 3.0
    rows[4, -1] = -100.0
    rows[5, : vocabulary // 2] = -torch.inf
    rows[6, :-1] = -torch.inf
    return rows.to(dtype)


def likely_and_unlikely(rows: Tensor) -> list[Tensor]:
    """Targets at the maximum of each row, and at its last entry, which no row masks."""
    return [rows.double().argmax(dim=1), torch.full((len(rows),), rows.shape[1] - 1)]


def exact_rows(logits: Tensor, targets: Tensor, temperature: float) -> list[Tensor]:
    wide = (logits.double() / temperature).log_softmax(dim=1)
    lse = (logits.double() / temperature).logsumexp(dim=1)
    return [wide.gather(1, targets[:, None]).squeeze(1), lse, reference.entropy(wide)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 1281, 4097])
@pytest.mark.parametrize("splits", [1, 5])
def test_logprob_rows(
    run: Run, dtype: torch.dtype, vocabulary: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A smaller block, so that every vocabulary takes several; so many processors that rows are split, or one.
    monkeypatch.setattr(triton_head_rows, "LARGEST_BLOCK", 512)
    monkeypatch.setattr(triton_head_rows, "processors", lambda device: 9 if splits > 1 else 1)
    rows = nasty_rows(vocabulary, dtype)
    for targets in likely_and_unlikely(rows):
        for entropy in (True, False):
            found = run(logprob_rows, rows, targets, 0.7, entropy)
            assert (found[0] <= 0).all()
            for ours, exact in zip(found[: 2 + entropy], exact_rows(rows, targets, 0.7), strict=False):
                torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=2e-5)
            assert (found[2] is None) == (not entropy)


@pytest.mark.parametrize("vocabulary", [50257, 128256, 151936])
def test_logprob_rows_of_real_vocabularies(run: Run, vocabulary: int) -> None:
    rows = nasty_rows(vocabulary, torch.float16)[3:6]
    for targets in likely_and_unlikely(rows):
        found = run(logprob_rows, rows, targets, 1.0, True)
        for ours, exact in zip(found, exact_rows(rows, targets, 1.0), strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("separate", [False, True])
def test_logit_gradient_rows(run: Run, dtype: torch.dtype, separate: bool) -> None:
    vocabulary = 4097
    wide = torch.zeros(7, vocabulary + 3, dtype=dtype)
    rows = wide[:, :vocabulary].copy_(nasty_rows(vocabulary, dtype))
    coefficient = torch.randn(14, generator=torch.Generator().manual_seed(0))[::2]
    targets = torch.stack(likely_and_unlikely(rows), dim=1)[:, 1]
    exact_lse = exact_rows(rows, targets, 0.7)[1]
    onehot = torch.nn.functional.one_hot(targets, vocabulary)
    share = (rows.double() / 0.7).softmax(dim=1)
    exact = coefficient.double()[:, None] / 0.7 * (onehot - share)
    before = rows.clone()
    out = torch.full((7, vocabulary), torch.nan, dtype=torch.float16) if separate else None
    found = run(logit_gradient_rows_, rows, targets, exact_lse.float(), coefficient, 0.7, out)
    into = rows if out is None else out
    assert found.equal(into)
    assert rows.equal(before) == separate
    assert not wide[:, vocabulary:].any()
    tolerance = 2e-5 if into.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(into.double(), exact, rtol=tolerance, atol=1e-6)


def test_the_targets_column_is_not_rounded_before_the_difference(run: Run) -> None:
    # p = 0.9999 would be 1 in fp16, and the gradient 0.
    rows = torch.tensor([[9.2103, 0.0]], dtype=torch.float16)
    targets = torch.zeros(1, dtype=torch.int64)
    lse = rows.double().logsumexp(dim=1)
    exact = 1.0 - (rows.double()[0, 0] - lse).exp()
    found = run(logit_gradient_rows_, rows, targets, lse.float(), torch.ones(1))
    torch.testing.assert_close(found[0, 0].double(), exact[0], rtol=1e-2, atol=0)


def test_no_rows_and_a_target_outside(run: Run) -> None:
    empty, ids = torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64)
    assert [part.shape for part in run(logprob_rows, empty, ids, 1.0, True)] == [(0,)] * 3
    assert run(logit_gradient_rows_, empty, ids, torch.zeros(0), torch.zeros(0)).shape == (0, 9)
    found = run(logprob_rows, torch.zeros(3, 9), torch.tensor([9, -1, 8]), 1.0, False)
    assert found[0].isnan().tolist() == [True, True, False]


def head(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + 7 * vocabulary)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.3).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    return hidden, weight, bias, torch.randint(0, vocabulary, (tokens,), generator=generator)


def exact_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grad: Tensor, temperature: float
) -> list[Tensor]:
    """Log-probs, entropies, and the gradients in hidden, weight and, where there is one, bias."""
    leaves = [leaf.double().requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]
    table = reference.head_distribution(*leaves, temperature=temperature)
    logprobs = table.gather(1, targets[:, None]).squeeze(1)
    logprobs.backward(grad.double())
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [logprobs.detach(), reference.entropy(table.detach()), *gradients]


def whole(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grad: Tensor, **settings: Any
) -> tuple[Tensor, ...]:
    """`linear_logprob` with entropy and the gradients: what the public op does with its kernels."""
    leaves = [leaf.detach().requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]
    found, entropies = linear_logprob(
        *leaves[:2], targets, bias=None if bias is None else leaves[2], return_entropy=True, **settings
    )
    gradients = torch.autograd.grad(found, leaves, grad)
    return (found.detach(), entropies, *gradients)


def assert_head(found: tuple[Tensor, ...], exact: list[Tensor], dtype: torch.dtype) -> None:
    assert (found[0] <= 0).all()
    for ours, true in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=2e-5, atol=3e-5)
    for ours, true in zip(found[2:], exact[2:], strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - true).norm() <= (
            2e-5 if dtype == torch.float32 else 2e-3
        ) * true.norm() + 1e-5


SMALL = Tuning(tokens=16, vocabulary=32, depth=16, warps=4, stages=2, group=3)


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles and groups in a small head."""
    monkeypatch.setattr(triton_linear_logprob, "tuning_for", lambda hidden: SMALL)


# One token; a tile of tokens and one more; widths that are and are not a multiple of a tile's depth.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary"), [(1, 16, 33), (17, 24, 1), (65, 32, 250), (81, 20, 97)]
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("_small_tiles")
def test_small_tiles(
    run: Run, dtype: torch.dtype, tokens: int, width: int, vocabulary: int, with_bias: bool
) -> None:
    hidden, weight, bias, targets = head(tokens, width, vocabulary, dtype)
    grad = torch.randn(tokens, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"temperature": 0.8, "chunk_tokens": max(1, tokens // 3)}
    inputs = (hidden, weight, bias if with_bias else None, targets, grad)
    assert_head(run(whole, *inputs, **settings), exact_head(*inputs, 0.8), dtype)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shipped_tiles(run: Run, dtype: torch.dtype, few: bool) -> None:
    tokens = 40 if few else 130
    hidden, weight, bias, targets = head(tokens, 40, 1281, dtype)
    targets[:3] = torch.tensor([1280, 0, 127])
    grad = torch.randn(tokens, generator=torch.Generator().manual_seed(2))
    inputs = (hidden, weight, bias, targets, grad)
    assert_head(run(whole, *inputs), exact_head(*inputs, 1.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("_small_tiles")
def test_nasty_logits(run: Run, dtype: torch.dtype) -> None:
    """The logits are chosen: hidden states are unit vectors, the weight's columns rows of `nasty_rows`."""
    rows = nasty_rows(417, dtype)[:5]
    hidden, weight = torch.eye(5, 16, dtype=dtype), torch.zeros(417, 16, dtype=dtype)
    weight[:, :5] = rows.T
    masked = torch.zeros(417, dtype=dtype)
    masked[:200] = -torch.inf  # whole tiles hold nothing else
    for bias in (None, masked):
        for targets in (torch.full((5,), 416), torch.tensor([300, 200, 416, 208, 310])):
            grad = torch.randn(5, generator=torch.Generator().manual_seed(6))
            inputs = (hidden, weight, bias, targets, grad)
            assert_head(run(whole, *inputs), exact_head(*inputs, 1.0), dtype)


@pytest.mark.usefixtures("_small_tiles")
def test_strided_inputs(run: Run) -> None:
    hidden, weight, bias, targets = head(37, 24, 77)
    grad = torch.randn(37, generator=torch.Generator().manual_seed(3))
    exact = exact_head(hidden, weight, bias, targets, grad, 1.0)
    wide = torch.full((37, 48), torch.nan)
    wide[:, ::2] = hidden
    spread_bias = torch.stack([bias, torch.full_like(bias, torch.nan)], dim=1)[:, 0]
    strided = (
        wide[:, ::2],
        weight.T.contiguous().T,
        spread_bias,
        torch.stack([targets, -targets], dim=1)[:, 0],
        torch.stack([grad, -grad], dim=1)[:, 0],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_head(run(whole, *strided, chunk_tokens=11), exact, torch.float32)
    expanded = run(whole, hidden, weight, bias, targets, torch.ones(()).expand(37))
    assert_head(expanded, exact_head(hidden, weight, bias, targets, torch.ones(37), 1.0), torch.float32)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.usefixtures("_small_tiles")
def test_frozen_inputs_cost_no_product(
    run: Run, needed: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, targets = head(20, 16, 70)
    grad = torch.randn(20)
    lse = (hidden @ weight.T + bias).logsumexp(dim=1)
    exact = exact_head(hidden, weight, bias, targets, grad, 1.0)[2:]
    with torch.profiler.profile() as profile:
        found = linear_logprob_backward_triton(grad, hidden, weight, targets, bias, lse, 1.0, 1024, needed)
    products = [event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_")]
    assert sum(products) == sum(needed[:2])
    for need, ours, true in zip(needed, found, exact, strict=True):
        assert (ours is not None) == need
        if ours is not None:
            torch.testing.assert_close(ours.double(), true, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("_small_tiles")
def test_a_slab_is_all_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = head(64, 16, 1000)
    made: list[tuple[int, ...]] = []
    empty = torch.empty

    def counting(*shape: Any, **settings: Any) -> Tensor:
        result = empty(*shape, **settings)
        made.append(tuple(result.shape))
        return result

    monkeypatch.setattr(torch, "empty", counting)
    lse = (hidden @ weight.T).logsumexp(dim=1)
    linear_logprob_backward_triton(
        torch.ones(64), hidden, weight, targets, None, lse, 1.0, 8, (True, True, False)
    )
    assert made == [(64, 96)]  # 8 * 1000 / 64 = 125 entries, of which three whole tiles of 32
    made.clear()
    linear_logprob_triton(hidden, weight, targets, None, 1.0, False)
    assert max(rows * columns for rows, columns in (shape for shape in made if len(shape) == 2)) <= 64 * 32


@pytest.fixture
def guarded(tmp_path: Path) -> Callable[[int, int], Tensor]:
    """fp16 rows at a large distance, [rows,stride], in a sparse file: only what is touched takes memory. 2^31 elements
    lie before them, where an offset cut to 32 bits lands: zeros, not a crash.
    """

    def rows(count: int, stride: int) -> Tensor:
        size = (1 << 31) + count * stride
        store = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
        return store[1 << 31 :].view(count, stride)

    return rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="a sparse file cannot be copied to a device")
def test_offsets_past_32_bits(
    run: Run, guarded: Callable[[int, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = guarded(3, (1 << 30) + 8)[:, :9]  # row 2 begins past 2^31
    logits.copy_(torch.randn(3, 9, generator=torch.Generator().manual_seed(4)))
    targets, before = torch.tensor([1, 2, 3]), logits.double()
    found = run(logprob_rows, logits, targets)
    for ours, exact in zip(found[:2], exact_rows(before, targets, 1.0), strict=False):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-5)
    run(logit_gradient_rows_, logits, targets, found[1], torch.ones(3))
    exact = torch.nn.functional.one_hot(targets, 9) - before.softmax(dim=1)
    torch.testing.assert_close(logits.double(), exact, rtol=2e-3, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a sparse file cannot be copied to a device")
@pytest.mark.parametrize("far", ["hidden", "weight"])
@pytest.mark.usefixtures("_small_tiles")
def test_offsets_of_tiles_past_32_bits(run: Run, guarded: Callable[[int, int], Tensor], far: str) -> None:
    hidden, weight, bias, targets = head(40, 16, 70, torch.float16)
    grad = torch.randn(40, generator=torch.Generator().manual_seed(5))
    exact = exact_head(hidden, weight, bias, targets, grad, 1.0)
    # Tiles of 16 tokens or 32 entries: the last of each begins past 2^31, a tile itself spans less.
    if far == "hidden":
        hidden = guarded(40, (1 << 26) + 64)[:, :16].copy_(hidden)
    else:
        weight = guarded(70, (1 << 25) + 64)[:, :16].copy_(weight)
    assert_head(run(whole, hidden, weight, bias, targets, grad), exact, torch.float16)


@pytest.mark.usefixtures("_small_tiles")
def test_a_rerun_is_bitwise_equal(run: Run) -> None:
    inputs = (*head(50, 16, 300, torch.float16), torch.randn(50))
    first, second = (run(whole, *inputs, chunk_tokens=10) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_and_unsupported(run: Run) -> None:
    hidden, weight, bias, targets = head(0, 8, 9)
    found = run(whole, hidden, weight, bias, targets, torch.zeros(0))
    assert [tuple(part.shape) for part in found] == [(0,), (0,), (0, 8), (9, 8), (9,)]
    assert not any(part.any() for part in found)
    with pytest.raises(RuntimeError, match=r"linear_logprob cannot run so: .*not torch\.float64"):
        run(linear_logprob, hidden.double(), weight.double(), targets)
