"""Rows of logits for the tests of head_rows, and what they must give: log-probs and gradients in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

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
