"""linear_preference: frozen inputs, layouts, reruns, refusals, in every implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from metareward_kernels import (
    implementation,
    linear_preference,
)
from metareward_kernels.pair_losses import PairLogprobs
from torch import Tensor

from tests.kernels.preference_checks import (
    LEAVES,
    TOLERANCE,
    make,
    oracle,
    run,
)

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("chunk_tokens", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "moving", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight")]
)
def test_frozen_inputs(moving: tuple[str, ...], dtype: torch.dtype, chunk_tokens: int) -> None:
    problem = make(dtype=dtype)
    _, exact = oracle(problem)
    for name in moving:
        problem[name].requires_grad_()
    found = linear_preference(**problem, chunk_tokens=chunk_tokens)
    assert found.loss.requires_grad == bool(moving)
    assert not found.losses.requires_grad
    assert not found.logprobs.requires_grad
    if moving:
        found.loss.backward()
    for name, true in zip(LEAVES, exact, strict=True):
        gradient = problem[name].grad
        assert (gradient is not None) == (name in moving)
        if gradient is not None:
            assert gradient.dtype == dtype
            assert (gradient.double() - true).norm() <= TOLERANCE[dtype] * true.norm()


@pytest.mark.parametrize(
    ("frozen", "chunk_tokens", "products"), [(False, 64, 3), (True, 8, 2), (False, 8, 4)]
)
def test_number_of_products(frozen: bool, chunk_tokens: int, products: int) -> None:
    problem = make(dtype=torch.float32, lengths=(20, 20), pairs=((0, 1),), bias=None)
    problem["hidden"].requires_grad_()
    problem["weight"].requires_grad_(not frozen)
    with torch.profiler.profile() as profile:
        linear_preference(**problem, chunk_tokens=chunk_tokens).loss.backward()
    calls = sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm_"))
    assert calls == products * math.ceil(40 / chunk_tokens)


def test_no_grad_keeps_nothing() -> None:
    problem = make(dtype=torch.bfloat16)
    problem["weight"].requires_grad_()
    with torch.no_grad():
        found = linear_preference(**problem)
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, linear_preference(**problem).loss.detach(), rtol=1e-6, atol=0.0)


def test_empty_inputs() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        nothing = make(0, dtype=dtype, lengths=(0, 0), pairs=((0, 1),))
        found, gradients = run(nothing)
        torch.testing.assert_close(found.loss.double(), oracle(nothing)[0][0], rtol=1e-6, atol=0.0)
        assert found.logprobs.tolist() == [0.0, 0.0]
        assert all(not gradient.any() for gradient in gradients)
        unpaired = make(dtype=dtype, pairs=())
        unpaired["pairs"] = torch.zeros(0, 2, dtype=torch.int64)
        found, gradients = run(unpaired, return_entropy=True)
        assert found.loss == 0.0
        assert (found.logprobs < 0).sum() == 5
        assert all(not gradient.any() for gradient in gradients)
        frozen = {**unpaired, "hidden": unpaired["hidden"].requires_grad_()}
        linear_preference(**frozen).loss.backward()
        assert not frozen["hidden"].grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_nothing(dtype: torch.dtype) -> None:
    problem = make(dtype=dtype)
    expected, exact = run(problem)
    strided = dict(problem)
    strided["hidden"] = torch.full((40, 24), math.nan, dtype=dtype)[:, ::2].copy_(problem["hidden"])
    strided["weight"] = problem["weight"].T.contiguous().T
    strided["bias"] = problem["bias"].repeat_interleave(3)[::3]
    strided["targets"] = problem["targets"].repeat_interleave(2)[::2]
    strided["cu_seqlens"] = problem["cu_seqlens"].int().repeat_interleave(2)[::2]
    strided["pairs"] = problem["pairs"].T.contiguous().T
    strided["reference_logprobs"] = problem["reference_logprobs"].repeat_interleave(2)[::2]
    leaves = [strided[name].requires_grad_() for name in LEAVES]
    found = linear_preference(**strided)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0.0)
    for ours, true in zip(torch.autograd.grad(found.loss, leaves), exact, strict=True):
        torch.testing.assert_close(ours, true, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twice_the_same_and_sums_up(dtype: torch.dtype) -> None:
    problem = make(vocabulary=1000, dtype=dtype)
    first, gradients = run(problem, chunk_tokens=16)
    second, again = run(problem, chunk_tokens=16)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    leaf = problem["weight"].requires_grad_()
    for _ in range(2):
        linear_preference(**problem, chunk_tokens=16).loss.backward()
    assert torch.equal(leaf.grad, 2 * gradients[1])
    found = linear_preference(**problem, chunk_tokens=16)
    kept = torch.autograd.grad(found.loss, leaf, retain_graph=True)[0]
    assert torch.equal(kept, torch.autograd.grad(found.loss, leaf)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        pytest.skip("PyTorch's own products may cut fp32 sums by threads")
    if implementation("linear_softmax") != "cpp":
        pytest.skip("needs the compiled kernel")
    problem = make(vocabulary=3000, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(problem))
    finally:
        torch.set_num_threads(threads)
    for found, gradients in results[1:]:
        assert torch.equal(found.logprobs, results[0][0].logprobs)
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))


def test_swapped_pairs_change_the_sign() -> None:
    def difference(pairs: PairLogprobs) -> Tensor:
        return pairs.margin

    problem = make(dtype=torch.float32, loss=difference)
    found, gradients = run(problem)
    swapped, opposite = run({**problem, "pairs": problem["pairs"].flip(1)})
    torch.testing.assert_close(found.loss, -swapped.loss)
    for a, b in zip(gradients, opposite, strict=True):
        torch.testing.assert_close(a, -b, rtol=1e-4, atol=1e-6)


def test_a_sequence_in_no_pair_gets_no_gradient() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = make(dtype=dtype, pairs=((0, 5),))
        found, gradients = run(problem)
        assert not gradients[0][5:29].any()
        assert gradients[0][:5].any(dim=1).all()
        assert (found.logprobs[2:5] < 0).all()


def test_weight_gradient_is_summed_in_fp32() -> None:
    # Hundreds of chunks that add 1/256 each: a bf16 sum would stop growing at 1.
    def total(pairs: PairLogprobs) -> Tensor:
        return pairs.chosen

    pairs = 1024
    problem = make(
        2 * pairs,
        2,
        2,
        torch.bfloat16,
        lengths=(1,) * (2 * pairs),
        pairs=tuple((2 * p, 2 * p + 1) for p in range(pairs)),
        loss=total,
        pair_weights=torch.full((pairs,), 1 / 128),
        bias=None,
    )
    problem["hidden"].fill_(1.0)
    problem["weight"].zero_()
    problem["targets"].zero_()
    _, gradients = run(problem, chunk_tokens=4)
    assert gradients[1].tolist() == [[4.0, 4.0], [-4.0, -4.0]]


def test_torch_equals_cpp_within_rounding(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "torch":
        pytest.skip("compares both")
    for dtype in (torch.float32, torch.bfloat16):
        problem = make(vocabulary=1280, dtype=dtype)
        monkeypatch.delenv("METAREWARD_KERNELS", raising=False)
        found, gradients = run(problem)
        monkeypatch.setenv("METAREWARD_KERNELS", "torch")
        plain, expected = run(problem)
        torch.testing.assert_close(found.logprobs, plain.logprobs, rtol=1e-6, atol=1e-5)
        for ours, theirs in zip(gradients, expected, strict=True):
            assert (ours.double() - theirs.double()).norm() <= TOLERANCE[dtype] * theirs.double().norm()


def test_under_autocast_and_compile() -> None:
    problem = make(dtype=torch.float32)
    expected, gradients = run(problem)
    with torch.autocast("cpu", torch.bfloat16):
        found, again = run(problem)
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_preference(**{**problem, "hidden": hidden * 2.0, "weight": weight}).loss * 3.0

    weight = problem["weight"].requires_grad_()
    plain = torch.autograd.grad(step(problem["hidden"], weight), weight)[0]
    torch._dynamo.reset()
    compiled = torch.autograd.grad(
        torch.compile(step, backend="aot_eager")(problem["hidden"], weight), weight
    )[0]
    torch.testing.assert_close(compiled, plain)
    assert torch._dynamo.explain(step)(problem["hidden"], weight).graph_break_count == 1


def test_bad_inputs() -> None:
    good = make(dtype=torch.float32)
    calls: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "one dtype of", {"weight": good["weight"].double()}),
        (TypeError, "one dtype of", {"hidden": good["hidden"].int(), "weight": good["weight"].int()}),
        (TypeError, "targets must be int64", {"targets": good["targets"].int()}),
        (ValueError, r"need hidden \[T,H\]", {"hidden": good["hidden"][:, :5]}),
        (ValueError, "one target a token", {"targets": good["targets"][:-1]}),
        (
            IndexError,
            r"targets span \[0, 101\]",
            {"targets": good["targets"].clamp(1)[:0].new_tensor([0, 101] * 20)},
        ),
        (ValueError, "floating bias", {"bias": good["bias"][1:]}),
        (ValueError, "one CPU or CUDA device", {"weight": good["weight"].to("meta")}),
        (ValueError, "temperature must be positive", {"temperature": 0.0}),
        (ValueError, "beta must be positive", {"beta": 0.0}),
        (ValueError, "cu_seqlens", {"cu_seqlens": good["cu_seqlens"] + 1}),
        (ValueError, "cu_seqlens", {"cu_seqlens": good["cu_seqlens"].flip(0)}),
        (TypeError, "cu_seqlens", {"cu_seqlens": good["cu_seqlens"].float()}),
        (ValueError, r"pairs must be \[P,2\]", {"pairs": good["pairs"][:, :1]}),
        (IndexError, "names a sequence outside", {"pairs": good["pairs"] + 1}),
        (IndexError, "names a sequence outside", {"pairs": -good["pairs"] - 1}),
        (ValueError, "with itself", {"pairs": torch.tensor([[2, 2]])}),
        (ValueError, "reference_logprobs must be", {"reference_logprobs": torch.zeros(3)}),
        (ValueError, "gets no gradient", {"reference_logprobs": torch.zeros(6, requires_grad=True)}),
        (ValueError, "pair_weights must be", {"pair_weights": torch.ones(2)}),
        (ValueError, "chunk_tokens", {"chunk_tokens": 0}),
        (ValueError, "one number a pair", {"loss": lambda pairs: pairs.margin.sum()}),
    ]
    for error, message, change in calls:
        with pytest.raises(error, match=message):
            linear_preference(**{**good, **change})
