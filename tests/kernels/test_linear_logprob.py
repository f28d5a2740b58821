"""linear_logprob: values, gradients, bounds, memory, in both implementations."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from metareward_kernels import linear_logprob, reference
from torch import Tensor

pytestmark = pytest.mark.usefixtures("kernels")


def make(
    tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 31 + vocabulary)
    states = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64) * 0.3).to(dtype)
    return states, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


def gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, seed_grad: Tensor, **settings: float | int
) -> list[Tensor]:
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    logprobs = linear_logprob(leaves[0], leaves[1], targets, **settings)  # type: ignore[arg-type]
    logprobs.backward(seed_grad.to(logprobs.dtype))
    return [logprobs.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]


def oracle(
    hidden: Tensor, weight: Tensor, targets: Tensor, seed_grad: Tensor, temperature: float = 1.0
) -> list[Tensor]:
    leaves = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logprobs = reference.linear_logprob(leaves[0], leaves[1], targets, temperature=temperature)
    logprobs.backward(seed_grad.double())
    return [logprobs.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]


@pytest.mark.parametrize("vocabulary", [1, 7, 257, 1280])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_match_the_reference(vocabulary: int, temperature: float) -> None:
    hidden, weight, targets = make(37, 24, vocabulary)
    seed_grad = torch.randn(37)  # a gradient of its own for every token
    found = gradients(hidden, weight, targets, seed_grad, temperature=temperature, chunk_tokens=8)
    for ours, exact in zip(found, oracle(hidden, weight, targets, seed_grad, temperature), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-5)


def test_bf16_stays_within_its_rounding() -> None:
    hidden, weight, targets = make(64, 64, 999, torch.bfloat16)
    seed_grad = torch.randn(64)
    found = gradients(hidden, weight, targets, seed_grad, chunk_tokens=20)
    exact = oracle(hidden, weight, targets, seed_grad)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert (found[0] - exact[0]).abs().max() < 0.05
    for ours, true in zip(found[1:], exact[1:], strict=True):
        assert (ours.double() - true).norm() / true.norm() < 0.02


def test_bf16_inputs_keep_fp32_logits(kernels: str) -> None:
    # Logits near 100, where bf16 has steps of 1/2: rounded logits would be off by up to 0.25.
    hidden, weight, targets = make(300, 64, 999, torch.bfloat16)
    hidden = torch.cat([hidden, torch.full((300, 1), 100.0, dtype=torch.bfloat16)], dim=1)
    weight = torch.cat([weight, torch.ones(999, 1, dtype=torch.bfloat16)], dim=1)
    seed_grad = torch.randn(300)
    found = gradients(hidden, weight, targets, seed_grad, temperature=0.9)
    exact = oracle(hidden, weight, targets, seed_grad, 0.9)
    assert (found[0] - exact[0]).abs().max() < 1e-4
    for ours, true in zip(found[1:], exact[1:], strict=True):
        assert (ours.double() - true).norm() / true.norm() < 0.004


def test_gradcheck_in_fp64() -> None:
    hidden, weight, targets = make(5, 4, 6, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, targets, temperature=0.8, chunk_tokens=2),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def test_gradcheck_with_a_bias() -> None:
    hidden, weight, targets = make(5, 4, 6, torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, targets, bias=b, temperature=1.3, chunk_tokens=2),
        (hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()),
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_a_bias_and_its_gradient(frozen: bool) -> None:
    hidden, weight, targets = make(37, 24, 1280)
    bias, seed_grad = torch.randn(2560)[::2].requires_grad_(), torch.randn(37)
    exact_bias = bias.detach().double().requires_grad_()
    exact = reference.linear_logprob(
        hidden.double(), weight.double(), targets, bias=exact_bias, temperature=0.7
    )
    exact.backward(seed_grad.double())
    # With hidden and weight frozen the bias alone is trained; without, all three are.
    leaves = [hidden.requires_grad_(not frozen), weight.requires_grad_(not frozen)]
    found = linear_logprob(leaves[0], leaves[1], targets, bias=bias, temperature=0.7, chunk_tokens=10)
    found.backward(seed_grad)
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-5)
    assert bias.grad is not None
    assert exact_bias.grad is not None
    torch.testing.assert_close(bias.grad.double(), exact_bias.grad, rtol=2e-5, atol=2e-5)
    assert (hidden.grad is None) == frozen


def test_a_bias_takes_entries_out_of_the_vocabulary() -> None:
    hidden, weight, targets = make(20, 8, 40)
    bias = torch.zeros(40)
    bias[25:] = -torch.inf
    weight.requires_grad_()
    inside = targets % 25
    found, entropy = linear_logprob(hidden, weight, inside, bias=bias, return_entropy=True)
    fewer, fewer_entropy = linear_logprob(hidden, weight[:25], inside, return_entropy=True)
    torch.testing.assert_close(found, fewer)
    torch.testing.assert_close(entropy, fewer_entropy)
    found.sum().backward()
    assert weight.grad is not None
    assert not weight.grad[25:].any()
    assert weight.grad[:25].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_entropy(dtype: torch.dtype) -> None:
    hidden, weight, targets = make(70, 16, 501, dtype)
    hidden[0] = 0.0  # a flat row: ln V
    hidden[1] *= 100.0  # nearly certain: 0
    logprobs, entropy = linear_logprob(
        hidden.requires_grad_(), weight, targets, temperature=0.9, return_entropy=True, chunk_tokens=30
    )
    exact = reference.entropy(
        reference.head_distribution(hidden.detach().double(), weight.double(), temperature=0.9)
    )
    torch.testing.assert_close(entropy.double(), exact, rtol=1e-5, atol=2e-5)
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    assert entropy.dtype == logprobs.dtype
    without = linear_logprob(hidden, weight, targets, temperature=0.9, chunk_tokens=30)
    assert logprobs.equal(without)


@pytest.mark.parametrize("offset", [0.0, -100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_above_zero(offset: float, dtype: torch.dtype) -> None:
    hidden, weight, _ = make(64, 16, 1001, dtype)
    hidden = torch.cat([hidden * 30, torch.ones(64, 1, dtype=dtype)], dim=1)
    weight = torch.cat([weight, torch.full((1001, 1), offset, dtype=dtype)], dim=1)
    best = (hidden @ weight.T).argmax(dim=1)
    logprobs = linear_logprob(hidden, weight, best)
    assert (logprobs <= 0).all()
    assert (logprobs > -1.0).any()  # some rows are nearly certain, where rounding could overshoot


def test_flat_and_single_peak() -> None:
    weight = torch.zeros(1003, 2)
    weight[17, 0] = 80.0
    hidden = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = linear_logprob(hidden, weight, torch.tensor([5, 17, 3]))
    torch.testing.assert_close(found, torch.tensor([-torch.tensor(1003.0).log(), 0.0, -80.0]))


def test_strided_inputs_and_gradients() -> None:
    hidden, weight, targets = make(24, 16, 55)
    seed_grad = torch.randn(24)
    exact = oracle(hidden, weight, targets, seed_grad)
    wide_hidden = torch.randn(24, 32)
    wide_hidden[:, ::2] = hidden
    column_weight = weight.T.contiguous().T
    spread_targets = targets.repeat_interleave(2)[::2]
    leaves = [wide_hidden[:, ::2].requires_grad_(), column_weight.requires_grad_()]
    logprobs = linear_logprob(leaves[0], leaves[1], spread_targets, chunk_tokens=10)
    (logprobs * seed_grad.repeat_interleave(3)[::3]).sum().backward()
    for ours, true in zip([logprobs, leaves[0].grad, leaves[1].grad], exact, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.double(), true, rtol=2e-5, atol=2e-5)
    expanded = gradients(hidden, weight, targets, torch.ones(()).expand(24))
    torch.testing.assert_close(
        expanded[1].double(), oracle(hidden, weight, targets, torch.ones(24))[1], rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_costs_no_product(frozen: int) -> None:
    hidden, weight, targets = make(12, 8, 40)
    exact = oracle(hidden, weight, targets, torch.ones(12))
    leaves = [hidden, weight]
    leaves[1 - frozen].requires_grad_()
    logprobs = linear_logprob(hidden, weight, targets)
    with torch.profiler.profile() as profile:
        logprobs.sum().backward()
    products = sum(
        event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_")
    )
    assert products == 2  # the recomputed logits and one gradient
    assert leaves[frozen].grad is None
    moving = leaves[1 - frozen].grad
    assert moving is not None
    torch.testing.assert_close(moving.double(), exact[2 - frozen], rtol=2e-5, atol=2e-5)


def test_weight_gradient_is_summed_in_fp32() -> None:
    # 512 chunks that add 2 each: a bf16 sum would stop at 512, where its step is 4.
    hidden = torch.ones(2048, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    linear_logprob(hidden, weight, torch.zeros(2048, dtype=torch.int64), chunk_tokens=4).sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [1024.0, -1024.0]


def test_no_grad_and_empty() -> None:
    hidden, weight, targets = make(3, 4, 9)
    with torch.no_grad():
        assert not linear_logprob(hidden.requires_grad_(), weight, targets).requires_grad
    weight.requires_grad_()
    empty = linear_logprob(hidden[:0], weight, targets[:0])
    empty.sum().backward()
    assert empty.shape == (0,)
    assert weight.grad is not None
    assert weight.grad.abs().sum() == 0


def test_a_rerun_is_bitwise_equal() -> None:
    hidden, weight, targets = make(100, 32, 513)
    first, second = (gradients(hidden, weight, targets, torch.ones(100), chunk_tokens=30) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [-1, 9, -100])
def test_target_outside_the_vocabulary(bad: int) -> None:
    hidden, weight, targets = make(3, 4, 9)
    targets[1] = bad
    with pytest.raises(IndexError, match=r"\[0, 8\]"):
        linear_logprob(hidden, weight, targets)


def test_bad_arguments() -> None:
    hidden, weight, targets = make(3, 4, 9)
    with pytest.raises(TypeError, match="one floating dtype"):
        linear_logprob(hidden.double(), weight, targets)
    with pytest.raises(TypeError, match="int64"):
        linear_logprob(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="one target a token"):
        linear_logprob(hidden, weight, targets[:2])
    with pytest.raises(TypeError, match="bias must have the weight's dtype"):
        linear_logprob(hidden, weight, targets, bias=torch.zeros(9).double())
    with pytest.raises(ValueError, match=r"need bias \[V\]"):
        linear_logprob(hidden, weight, targets, bias=torch.zeros(8))
    with pytest.raises(ValueError, match="vocabulary of at least 1"):
        linear_logprob(hidden, weight[:0], targets)
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        linear_logprob(hidden, weight.to("meta"), targets)
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="chunk_tokens"):
        linear_logprob(hidden, weight, targets, chunk_tokens=0)


def test_opcheck() -> None:
    hidden, weight, targets = make(6, 4, 9)
    strided = torch.randn(6, 8)[:, ::2]
    for states, ids in [(hidden, targets), (strided, targets), (hidden[:0], targets[:0])]:
        for bias in (None, torch.randn(18)[::2].requires_grad_()):
            leaves = (states.detach().requires_grad_(), weight.detach().requires_grad_())
            arguments = (*leaves, ids, bias, 0.9, 4, bias is not None)
            torch.library.opcheck(torch.ops.metareward.linear_logprob.default, arguments)
            lse, constant = torch.randn(ids.shape[0]), None if bias is None else bias.detach()
            backward = (lse.clone(), states, weight, ids, constant, lse, 0.9, 4, True, True, bias is not None)
            torch.library.opcheck(torch.ops.metareward.linear_logprob_backward.default, backward)


PEAK = """
import sys, torch
from metareward_kernels import linear_logprob

def peak():  # not ru_maxrss, which starts at what the parent had
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

tokens, vocabulary, dtype = 4096, 49152, getattr(torch, sys.argv[1])
hidden = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
weight = torch.randn(vocabulary, 16, dtype=dtype, requires_grad=True)
targets = torch.randint(0, vocabulary, (tokens,))
linear_logprob(hidden[:2], weight, targets[:2]).sum().backward()
before = peak()
if sys.argv[2] == "forward":
    with torch.no_grad():
        linear_logprob(hidden, weight, targets)
else:
    linear_logprob(hidden, weight, targets).sum().backward()
extra = (peak() - before) * 1024
eager = 2 * 4 * tokens * vocabulary  # the least: fp32 logits, and their log-softmax kept for the backward pass
print(extra / eager)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("direction", "bound"), [("forward", 0.1), ("backward", 0.2)])
def test_peak_memory(dtype: str, direction: str, bound: float) -> None:
    command = [sys.executable, "-c", PEAK, dtype, direction]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 0.0 <= float(printed) < bound, f"{float(printed):.3f} of the eager path's memory"
