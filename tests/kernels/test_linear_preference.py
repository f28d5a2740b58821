"""linear_preference: values, gradients, layouts, memory, in every implementation."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import cache, partial
from typing import Any

import pytest
import torch
from metareward_kernels import (
    Preference,
    dpo_loss,
    implementation,
    linear_logprob,
    linear_preference,
    reference,
)
from metareward_kernels.head_rows import logprob_rows, softmax_residual_rows_
from metareward_kernels.pair_losses import PairLogprobs, PairLoss, dpo, hinge, ipo
from torch import Tensor

DPO = partial(dpo, beta=0.1)


@pytest.fixture(params=["cpp", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("METAREWARD_KERNELS", raising=False)
    if request.param == "cpp" and implementation("head_rows") != "cpp":
        pytest.skip("the compiled library is not built")
    if request.param == "torch":
        monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    return request.param


def weighted(pairs: PairLogprobs) -> Tensor:
    """A loss of no special form: lengths, both references, both log-probs each in its own way."""
    per_token = pairs.chosen / pairs.chosen_tokens.clamp_min(1) - 0.5 * pairs.rejected / 7
    return (
        (per_token - 0.1 * pairs.margin).tanh() + 0.01 * pairs.chosen_ratio.square() + pairs.rejected_tokens
    )


def make(
    tokens: int = 40,
    width: int = 12,
    vocabulary: int = 101,
    dtype: torch.dtype = torch.float64,
    lengths: tuple[int, ...] = (5, 0, 9, 1, 14, 11),
    pairs: tuple[tuple[int, int], ...] = ((0, 2), (4, 3), (3, 5)),
    **more: Any,
) -> dict[str, Any]:
    """Sequence 1 is empty and in no pair; 3, 4 and 5 hang together."""
    generator = torch.Generator().manual_seed(tokens * 31 + vocabulary)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    assert sum(lengths) == tokens
    return {
        "hidden": randn(tokens, width).to(dtype),
        "weight": (randn(vocabulary, width) * 0.3).to(dtype),
        "bias": randn(vocabulary).to(dtype),
        "targets": torch.randint(0, vocabulary, (tokens,), generator=generator),
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        "pairs": torch.tensor(pairs),
        "reference_logprobs": randn(len(lengths)) - 10,
        "loss": DPO,
        **more,
    }


LEAVES = ("hidden", "weight", "bias")


def run(problem: dict[str, Any], upstream: float = 1.0, **settings: Any) -> tuple[Preference, list[Tensor]]:
    problem = dict(problem)
    leaves = [problem[name].detach().clone().requires_grad_() for name in LEAVES if problem[name] is not None]
    problem.update(zip([name for name in LEAVES if problem[name] is not None], leaves, strict=True))
    found = linear_preference(**problem, **settings)
    (found.loss * upstream).backward()
    return found, [leaf.grad for leaf in leaves if leaf.grad is not None]


def oracle(problem: dict[str, Any], upstream: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    problem = dict(problem)
    names = [name for name in LEAVES if problem[name] is not None]
    leaves = [problem[name].detach().double().clone().requires_grad_() for name in names]
    problem.update(zip(names, leaves, strict=True))
    values = reference.linear_preference(**problem)
    (values[0] * upstream).backward()
    return [x.detach() for x in values], [leaf.grad for leaf in leaves if leaf.grad is not None]


def assert_matches(problem: dict[str, Any], tolerance: float, upstream: float = 1.0, **settings: Any) -> None:
    found, gradients = run(problem, upstream, return_entropy=True, **settings)
    (loss, logprobs, entropy), exact = oracle(problem, upstream)
    assert found.entropy is not None
    values = 1e-9 if found.loss.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.loss.double(), loss, rtol=values, atol=values)
    torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=values, atol=values)
    torch.testing.assert_close(found.entropy, entropy, rtol=values, atol=values)
    assert len(gradients) == len(exact)
    for ours, true in zip(gradients, exact, strict=True):
        assert (ours.double() - true).norm() <= tolerance * true.norm()
    chosen, rejected = problem["pairs"].unbind(dim=1)
    ratios = logprobs - problem["reference_logprobs"]
    rewards = settings.get("beta", 1.0) * ratios
    torch.testing.assert_close(found.chosen_rewards, rewards[chosen], rtol=values, atol=values)
    torch.testing.assert_close(found.rejected_rewards, rewards[rejected], rtol=values, atol=values)
    torch.testing.assert_close(found.margins, rewards[chosen] - rewards[rejected], rtol=values, atol=values)
    assert torch.equal(found.accuracy, (found.margins > 0).float())
    assert (found.logprobs <= 0).all()


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.006, torch.float16: 0.002}


def skip_where_not_compiled(kernels: str, dtype: torch.dtype) -> None:
    if kernels == "cpp" and dtype in (torch.float64, torch.float16):
        pytest.skip("float64 and float16 have no compiled kernel: the other parameter tests them")


# A chunk of 8 tokens is shorter than every pair, 16 takes one pair, 64 takes all.
@pytest.mark.parametrize("chunk_tokens", [8, 16, 64])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("with_bias", [True, False])
def test_matches_the_reference(kernels: str, chunk_tokens: int, dtype: torch.dtype, with_bias: bool) -> None:
    skip_where_not_compiled(kernels, dtype)
    problem = make(dtype=dtype)
    if not with_bias:
        problem["bias"] = None
    assert_matches(
        {**problem, "temperature": 0.8}, TOLERANCE[dtype], upstream=-0.7, chunk_tokens=chunk_tokens
    )


@pytest.mark.parametrize(
    "loss",
    [
        DPO,
        partial(dpo, beta=0.3, label_smoothing=0.2),
        partial(ipo, beta=0.2),
        partial(hinge, beta=0.05),
        weighted,
    ],
    ids=["dpo", "smoothed", "ipo", "hinge", "custom"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses(kernels: str, loss: PairLoss, dtype: torch.dtype) -> None:
    skip_where_not_compiled(kernels, dtype)
    problem = make(dtype=dtype, loss=loss, pair_weights=torch.tensor([0.5, -1.0, 2.0]))
    assert_matches(problem, 2 * TOLERANCE[dtype], chunk_tokens=30)


def test_rewards_are_those_of_dpo_loss() -> None:
    problem = make()
    found, _ = run(problem, beta=0.1)
    tokens = linear_logprob(problem["hidden"], problem["weight"], problem["targets"], bias=problem["bias"])
    settings = (problem["cu_seqlens"], problem["pairs"], problem["reference_logprobs"])
    other = dpo_loss(tokens, *settings, beta=0.1)
    torch.testing.assert_close(found.losses, other.losses)
    torch.testing.assert_close(found.chosen_rewards, other.chosen_rewards)
    torch.testing.assert_close(found.rejected_rewards, other.rejected_rewards)
    torch.testing.assert_close(found.margins, other.margins)


@pytest.mark.parametrize("vocabulary", [1, 7, 48, 383, 385, 800, 1280, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabularies(vocabulary: int, dtype: torch.dtype) -> None:
    if vocabulary == 1:  # the only token is certain: no gradient
        found, gradients = run(make(vocabulary=1, dtype=dtype))
        assert found.logprobs.tolist() == [0.0] * 6
        assert all(not gradient.any() for gradient in gradients)
        return
    assert_matches(make(vocabulary=vocabulary, dtype=dtype), TOLERANCE[dtype], chunk_tokens=64)


@pytest.mark.parametrize("width", [1, 2, 30, 33, 47, 50, 130])
@pytest.mark.parametrize("rows", [1, 9, 520, 1030])
def test_shapes_that_fit_no_tile(width: int, rows: int) -> None:
    problem = make(
        rows + 3, width, 70, torch.bfloat16, lengths=(rows, 3), pairs=((0, 1),), loss=partial(dpo, beta=0.01)
    )
    assert_matches(problem, TOLERANCE[torch.bfloat16], chunk_tokens=2048)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "nature", ["flat", "near -100", "one at +80", "one at +3000", "target far below", "rising"]
)
def test_nasty_logits(nature: str, dtype: torch.dtype) -> None:
    problem = make(vocabulary=2000, dtype=dtype)
    problem["hidden"][:, 0] = 1.0
    column = problem["weight"][:, 0]
    column.zero_()
    if nature == "flat":
        problem["weight"].zero_()
        problem["bias"].zero_()
    elif nature == "near -100":
        column.fill_(-100.0)
    elif nature == "target far below":
        column.fill_(64.0)
        column[problem["targets"]] = -64.0
    elif nature == "rising":  # every stretch of the vocabulary is far above the one before
        column.copy_(torch.arange(2000) // 250 * 48.0)
    else:
        column[1234] = 80.0 if nature == "one at +80" else 3000.0
        problem["targets"][::3] = 1234
    found, gradients = run(problem, return_entropy=True)
    (loss, logprobs, entropy), exact = oracle(problem)
    torch.testing.assert_close(found.logprobs, logprobs, rtol=2e-6, atol=1e-4)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-5, atol=1e-6)
    assert (found.logprobs <= 0).all()
    # Where all logits hang on one column of the weight, its hidden gradient is the rounding of sum(p) - 1, times 64 or 100.
    gradients[0], exact[0] = gradients[0][:, 1:], exact[0][:, 1:]
    for ours, true in zip(gradients, exact, strict=True):
        assert (ours.double() - true).norm() <= (2e-5 if dtype == torch.float32 else 0.008) * true.norm()


def test_masked_vocabulary_and_not_a_number() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = make(dtype=dtype)
        problem["bias"][50:60] = -math.inf
        problem["targets"] %= 50
        found, gradients = run(problem, return_entropy=True)
        assert found.entropy is not None
        assert found.entropy.isfinite().all()
        assert found.logprobs.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[2][50:60].any()
        problem["hidden"][2] = math.nan  # in sequence 0
        found, _ = run(problem)
        assert found.logprobs.isnan().tolist() == [True] + [False] * 5
        assert found.losses.isnan().tolist() == [True, False, False]


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    problem = make(9, 4, 6, lengths=(3, 2, 0, 4), pairs=((0, 1), (3, 0)), loss=weighted)
    inputs = [problem[name].requires_grad_() for name in LEAVES]
    for chunk_tokens in (2, 100):
        assert torch.autograd.gradcheck(
            lambda h, w, b, chunk_tokens=chunk_tokens: (
                linear_preference(
                    **{**problem, "hidden": h, "weight": w, "bias": b},
                    temperature=0.7,
                    chunk_tokens=chunk_tokens,
                ).loss
            ),
            inputs,
        )


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


@pytest.mark.parametrize("vocabulary", [1, 17, 64, 1000, 1041])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [False, True])
def test_residual_rows(vocabulary: int, dtype: torch.dtype, rounded: bool) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(9, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(0, vocabulary, (9,), generator=generator)
    exact = (logits.double() / 0.7).log_softmax(dim=1)
    residual = torch.nn.functional.one_hot(targets, vocabulary) - exact.exp()
    plain = logprob_rows(logits, targets, 0.7, entropy=True)
    out = torch.empty(9, vocabulary, dtype=torch.bfloat16) if rounded and dtype == torch.float32 else None
    work = logits.clone()
    found = softmax_residual_rows_(work, targets, 0.7, entropy=True, out=out)
    for rows in (plain, found):
        assert rows.entropy is not None
        at_target = exact.gather(1, targets[:, None]).squeeze(1)
        torch.testing.assert_close(rows.logprobs.double(), at_target, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(
            rows.lse.double(), (logits.double() / 0.7).logsumexp(dim=1), rtol=1e-6, atol=1e-5
        )
        torch.testing.assert_close(
            rows.entropy.double(), -(exact.exp() * exact).sum(dim=1), rtol=1e-5, atol=1e-5
        )
    result = work if out is None else out
    relative = 2e-6 if result.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(result.double(), residual, rtol=relative, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logprobs_without_gradients_are_those_of_training_to_the_bit(dtype: torch.dtype) -> None:
    """A reference computed by this op must not differ from the policy by rounding: the first DPO loss would not be ln 2."""
    lengths = (70, 3, 41, 90, 0, 12, 33)
    problem = make(249, 64, 1003, dtype, lengths, ((3, 0), (1, 6), (6, 2)))
    # Unpaired sequences, a component apart in the row, and one longer than a chunk.
    for chunk_tokens in (100, 4096):
        trained, _ = run(problem, chunk_tokens=chunk_tokens)
        with torch.no_grad():
            alone = linear_preference(**problem, chunk_tokens=chunk_tokens)
        assert torch.equal(alone.logprobs, trained.logprobs)
        assert torch.equal(alone.losses, trained.losses)


MEMORY = """
import functools, sys, torch
from metareward_kernels import linear_preference
from metareward_kernels.pair_losses import dpo
torch.set_num_threads(1)
path, dtype, tokens, width, vocabulary = sys.argv[1], getattr(torch, sys.argv[2]), 4096, 16, 49152
hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
targets = torch.randint(0, vocabulary, (tokens,))
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def call(tokens):
    sums = tokens // 8
    starts, pairs = torch.arange(0, tokens + 1, sums), torch.arange(8).view(4, 2)
    if path == "eager":
        logprobs = (hidden[:tokens] @ weight.T).float().log_softmax(1).gather(1, targets[:tokens, None])
        logprobs = logprobs.view(8, sums).sum(1)
        torch.nn.functional.softplus(0.1 * (logprobs[1::2] - logprobs[::2])).mean().backward()
    else:
        loss = functools.partial(dpo, beta=0.1)
        linear_preference(hidden[:tokens], weight, targets[:tokens], starts, pairs, torch.zeros(8), loss).loss.backward()
call(16)  # loads and allocates what any call does
before = peak()
call(tokens)
print(peak() - before)
"""


@cache
def extra_memory(path: str, dtype: str, kernels: str) -> int:
    """KiB that a call adds to the peak of a process of its own."""
    command = [sys.executable, "-c", MEMORY, path, dtype]
    environment = {**os.environ, "METAREWARD_KERNELS": "torch" if kernels == "torch" else ""}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the kernel's record of the peak")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_a_fifth_of_eager(kernels: str, dtype: str) -> None:
    if kernels == "torch" and dtype == "bfloat16":
        pytest.skip("without the compiled kernel bf16 products are slow")

    ours, eager = extra_memory("ours", dtype, kernels), extra_memory("eager", dtype, "")
    assert eager > 4096 * 49152 * 4 * 2 // 1024  # the eager path did hold two such matrices, in KiB
    assert ours <= 0.2 * eager
