"""Problems for linear_preference, and what it must give for them: the reference in fp64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from metareward_kernels import (
    Preference,
    linear_preference,
    reference,
)
from metareward_kernels.pair_losses import PairLogprobs, dpo
from torch import Tensor

DPO = partial(dpo, beta=0.1)


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
