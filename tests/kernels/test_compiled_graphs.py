"""The head's ops under torch.compile: one graph, the same results and gradients, the same refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from metareward_kernels import (
    dpo_loss,
    gather_logprob,
    linear_logprob,
)
from torch import Tensor

from tests.kernels.dpo_checks import TANGLED
from tests.kernels.op_cases import ids, randn


def outcome(function: Callable[..., Any], leaves: list[Tensor], *rest: Any, **named: Any) -> list[Tensor]:
    """Results and gradients; every result that has a gradient is weighed with numbers of its own."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    results = function(*leaves, *rest, **named)
    results = [results] if isinstance(results, Tensor) else [part for part in results if part is not None]
    sum(
        (part * torch.linspace(-1, 2, part.numel())).sum() for part in results if part.requires_grad
    ).backward()
    return [*(part.detach() for part in results), *(x.grad for x in leaves if x.grad is not None)]


def soft_capped(raw: Tensor, targets: Tensor) -> Tensor:
    return gather_logprob(8.0 * torch.tanh(raw / 8.0), targets, temperature=0.7)


HIDDEN, WEIGHT, TARGETS = randn(7, 6), randn(19, 6), ids(7, 19)
COMPILE_CASES: dict[str, tuple[Callable[..., Any], list[Tensor], tuple[Any, ...], dict[str, Any]]] = {
    "linear_logprob": (linear_logprob, [HIDDEN, WEIGHT], (TARGETS,), {"temperature": 0.7, "chunk_tokens": 3}),
    "gather_logprob": (soft_capped, [randn(7, 19)], (TARGETS,), {}),
    "gather_logprob of an input": (gather_logprob, [randn(7, 19)], (TARGETS,), {"keep_logits": True}),
    "dpo_loss": (dpo_loss, [TANGLED.logprobs], TANGLED[1:], {"beta": 0.3, "label_smoothing": 0.1}),
    "dpo_loss, ipo": (dpo_loss, [TANGLED.logprobs], TANGLED[1:], {"beta": 0.3, "loss": "ipo"}),
}


@pytest.mark.parametrize("name", list(COMPILE_CASES))
def test_one_compiled_graph_equals_eager(name: str) -> None:
    function, leaves, rest, named = COMPILE_CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, wanted = outcome(compiled, leaves, *rest, **named), outcome(function, leaves, *rest, **named)
    assert len(found) == len(wanted) >= 2
    for ours, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=1e-6)


def test_compiled_gather_keeps_the_logits_for_others() -> None:
    """The in-place gradient is eager's alone: a graph may read the logits after it."""

    def both(raw: Tensor) -> Tensor:
        logits = raw * 2.0
        return gather_logprob(logits, TARGETS) + logits.square().sum(dim=1)

    raw = randn(7, 19)
    found = outcome(torch.compile(both, fullgraph=True, backend="aot_eager"), [raw])

    def plain(raw: Tensor) -> Tensor:
        logits = raw * 2.0
        return logits.log_softmax(1).gather(1, TARGETS[:, None]).squeeze(1) + logits.square().sum(dim=1)

    for ours, true in zip(found, outcome(plain, [raw]), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-5)


def test_values_are_checked_under_compile() -> None:
    compiled = torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="pairs name sequences"):
        compiled(*TANGLED[:2], torch.tensor([[0, 8]]), TANGLED.reference, beta=0.1)
    compiled = torch.compile(gather_logprob, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="outside the vocabulary"):
        compiled(randn(2, 5), torch.tensor([1, 5]))


def test_the_chain_that_a_trainer_runs_is_one_graph() -> None:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs = linear_logprob(hidden, weight, targets)
        return dpo_loss(logprobs, *TANGLED[1:], beta=0.3).losses

    tokens = len(TANGLED.logprobs)
    hidden, targets = randn(tokens, 6), ids(tokens, 19)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, true in zip(outcome(compiled, [hidden, WEIGHT]), outcome(loss, [hidden, WEIGHT]), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-5)
