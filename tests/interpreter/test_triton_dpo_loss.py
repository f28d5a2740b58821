"""Triton's DPO loss in the interpreter: tests/kernels/dpo_checks.py, its bounds, and its registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from metareward_kernels import dpo_loss, triton_dpo_loss
from metareward_kernels.triton_dpo_loss import dpo_loss_backward_triton, dpo_loss_triton

from tests.kernels import dpo_checks
from tests.kernels.dpo_checks import TANGLED, make, weights

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", "triton")
    # Small blocks stand for long sequences and many pairs (and the interpreter reduces one element at a time).
    monkeypatch.setattr(triton_dpo_loss, "BLOCK_TOKENS", 8)
    monkeypatch.setattr(triton_dpo_loss, "BLOCK_PAIRS", 2)


@pytest.mark.parametrize("check", list(dpo_checks.CHECKS))
def test_check(check: str) -> None:
    dpo_checks.CHECKS[check](dpo_loss)


def test_nothing_outside_is_read(run: Run) -> None:
    """Bounds and pairs that lead outside: neighbours of the tensors are NaN, and no result is but the wild pair's."""
    logprobs, cu_seqlens, pairs, reference = TANGLED
    around = torch.full((len(logprobs) + 200,), torch.nan)
    around[100:-100] = logprobs
    wild_bounds = cu_seqlens.clone()
    wild_bounds[0], wild_bounds[-1] = -50, len(logprobs) + 60
    wild_pairs = torch.cat([pairs, torch.tensor([[0, 8], [-1, 2], [2**40, 0]])])
    found = run(dpo_loss_triton, around[100:-100], wild_bounds, wild_pairs, reference, 0.3, "sigmoid", 0.0)
    clean = run(dpo_loss_triton, *TANGLED, 0.3, "sigmoid", 0.0)
    assert torch.equal(found[1], clean[1])
    for ours, true in ((found[0], clean[0]), (found[5], clean[5])):
        assert torch.equal(ours[:6], true)
        assert ours[6:].isnan().all()
    grad_losses, grad_sums = weights(TANGLED)
    wild_grads = torch.cat([grad_losses, torch.zeros(3)])
    slopes = torch.cat([clean[5], torch.full((3,), torch.nan)])
    gradient = run(
        dpo_loss_backward_triton, wild_grads, grad_sums, slopes, wild_bounds, wild_pairs[:6], len(logprobs)
    )
    wanted = run(dpo_loss_backward_triton, grad_losses, grad_sums, clean[5], cu_seqlens, pairs, len(logprobs))
    assert torch.equal(gradient, wanted)


def test_tokens_of_no_sequence_get_no_gradient(run: Run) -> None:
    grad_losses, grad_sums = weights(TANGLED)
    slopes = torch.ones(len(grad_losses))
    gradient = run(
        dpo_loss_backward_triton, grad_losses, grad_sums, slopes, TANGLED.cu_seqlens, TANGLED.pairs, 120
    )
    assert not gradient[94:].any()
    assert gradient[:7].any()


def test_float64_is_not_taken() -> None:
    with pytest.raises(
        RuntimeError, match=r"cannot run so: the Triton kernel takes float32, not torch\.float64"
    ):
        dpo_loss(TANGLED.logprobs.double(), *TANGLED[1:3], TANGLED.reference.double(), beta=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the arguments are on the CPU")
def test_opcheck() -> None:
    case = make([3, 0, 9], [(0, 2), (2, 1)])
    strided = case._replace(logprobs=case.logprobs.repeat_interleave(2)[::2])
    for logprobs, *rest in (case, strided, make([], [])):
        arguments = (logprobs.detach().requires_grad_(), *rest, 0.3, "sigmoid", 0.1)
        torch.library.opcheck(torch.ops.metareward.dpo_loss.default, arguments)
    arguments = (torch.randn(2), torch.randn(3), torch.randn(2), case.cu_seqlens, case.pairs, 12)
    torch.library.opcheck(torch.ops.metareward.dpo_loss_backward.default, arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the arguments are on the CPU")
def test_compiled_is_eager() -> None:
    grad_losses, grad_sums = weights(TANGLED)
    compiled = torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")
    found, eager = (
        dpo_checks.computed(op, TANGLED, grad_losses, grad_sums, beta=0.3) for op in (compiled, dpo_loss)
    )
    assert all(torch.equal(a, b) for a, b in zip(found[0], eager[0], strict=True))
    assert torch.equal(found[1], eager[1])
