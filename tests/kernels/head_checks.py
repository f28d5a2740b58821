"""What every op from logits to log-probs must hold, as functions of the op: for its tests in each implementation, and for
the mistake tests, which see to it that a damaged op fails them.

An op here is a function of logits [T,V] (or what makes them), targets [T] and a temperature. `CHECKS` is all there is to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from metareward_kernels import gather_logprob, linear_logprob
from torch import Tensor

Logprob = Callable[
    [Tensor, Tensor, float], Tensor
]  # logits [T,V], targets [T], temperature -> [T], differentiable

# No multiple of any tile, a multiple of most, and the least there is.
VOCABULARIES = (1, 7, 130, 257, 1280)
FP32 = {"rtol": 2e-5, "atol": 2e-5}
ROUNDED = {
    torch.float32: FP32,
    torch.float16: {"rtol": 2e-3, "atol": 1e-4},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-3},
}


def from_logits(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    # Times one: a leaf cannot give its storage to its gradient.
    return gather_logprob(logits * 1, targets, temperature=temperature)


def from_kept_logits(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return gather_logprob(logits, targets, temperature=temperature, keep_logits=True)


def through_a_head(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """linear_logprob with an identity for a head: its logits are those given, to the bit."""
    identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    return linear_logprob(logits, identity, targets, temperature=temperature, chunk_tokens=5)


OPS: dict[str, Logprob] = {
    "gather_logprob": from_logits,
    "gather_logprob, logits kept": from_kept_logits,
    "linear_logprob": through_a_head,
}


def nasty_rows(vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits [11,V] and targets: random, flat, all far below and far above zero, one peak, ties; the last id is a target."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(11, vocabulary, generator=generator) * 3
    logits[1] = 0.0
    logits[2] = logits[2] * 0.1 - 100.0
    logits[3] = -100.0
    logits[4] = logits[4] * 0.1 + 100.0
    logits[5, vocabulary // 2] = 80.0
    logits[6] = -60.0
    logits[6, -1] = 20.0
    logits[7] = logits[7].round()
    targets = torch.randint(0, vocabulary, (11,), generator=generator)
    targets[5], targets[6], targets[8], targets[9] = vocabulary // 2, 0, 0, vocabulary - 1
    return logits.to(dtype), targets


def exact(logits: Tensor, targets: Tensor, temperature: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and the gradient of the logits, in fp64."""
    leaf = logits.double().requires_grad_()
    logprobs = (leaf / temperature).log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
    logprobs.backward(grad.double())
    assert leaf.grad is not None
    return logprobs.detach(), leaf.grad


def computed(
    op: Logprob, logits: Tensor, targets: Tensor, temperature: float, grad: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    logprobs = op(leaf, targets, temperature)
    logprobs.backward(grad.to(logprobs.dtype))
    assert leaf.grad is not None
    assert leaf.grad.dtype == logits.dtype
    return logprobs.detach(), leaf.grad


def check_values_and_gradients(op: Logprob) -> None:
    """Every row against fp64, with a gradient of its own for each, at two temperatures."""
    for vocabulary in VOCABULARIES:
        for temperature in (1.0, 0.7):
            logits, targets = nasty_rows(vocabulary)
            grad = torch.randn(len(targets), generator=torch.Generator().manual_seed(1))
            found, gradient = computed(op, logits, targets, temperature, grad)
            wanted, wanted_gradient = exact(logits, targets, temperature, grad)
            torch.testing.assert_close(found.double(), wanted, **FP32)
            torch.testing.assert_close(gradient.double(), wanted_gradient, **FP32)
            norm = wanted_gradient.norm()
            assert abs(gradient.double().norm() - norm) <= 2e-5 * norm + 2e-5


def check_half_precision(op: Logprob, dtype: torch.dtype = torch.float16) -> None:
    """Half-precision logits: log-probs as exact as from fp32, gradients rounded once."""
    for vocabulary in VOCABULARIES[-2:]:
        logits, targets = nasty_rows(vocabulary, dtype)
        grad = torch.randn(len(targets), generator=torch.Generator().manual_seed(2))
        found, gradient = computed(op, logits, targets, 0.9, grad)
        wanted, wanted_gradient = exact(logits, targets, 0.9, grad)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, **FP32)
        torch.testing.assert_close(gradient.double(), wanted_gradient, **ROUNDED[dtype])


def check_never_above_zero(op: Logprob) -> None:
    """The target with the largest logit, where rounding could overshoot."""
    for vocabulary in VOCABULARIES:
        for offset in (0.0, -100.0, 1e4):
            logits, _ = nasty_rows(vocabulary)
            logits = logits * 20 + offset
            found = op(logits, logits.argmax(dim=1), 1.0)
            assert (found <= 0.0).all()
            assert (found > -8.0).all()  # the likeliest of 1280


def check_gradient_rows_sum_to_zero(op: Logprob) -> None:
    """Adding a constant to a row changes no log-prob."""
    logits, targets = nasty_rows(257)
    _, gradient = computed(op, logits, targets, 1.3, torch.full((len(targets),), 5.0))
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(len(targets)), rtol=0, atol=2e-5)


def check_tokens_stand_alone(op: Logprob) -> None:
    """One token at a time gives what all together give, and a token of gradient zero moves nothing."""
    logits, targets = nasty_rows(130)
    grad = torch.arange(len(targets)).float() - 4.0
    found, gradient = computed(op, logits, targets, 1.0, grad)
    assert not gradient[4].any()
    for t in (0, 4, len(targets) - 1):
        alone, own = computed(op, logits[t : t + 1], targets[t : t + 1], 1.0, grad[t : t + 1])
        torch.testing.assert_close(alone, found[t : t + 1], **FP32)
        torch.testing.assert_close(own, gradient[t : t + 1], **FP32)


def check_strides(op: Logprob) -> None:
    """Every second column of a wider tensor; every second target; gradients of stride 0 and of stride 3."""
    logits, targets = nasty_rows(130)
    for layout in ("columns", "transposed", "padded"):
        if layout == "columns":
            wide = torch.zeros(len(targets), 260)
            strided = wide[:, ::2]
        elif layout == "transposed":
            strided = torch.zeros(130, len(targets)).T
        else:
            strided = torch.full((len(targets), 160), math.nan)[:, :130]
        strided.copy_(logits)
        leaf = strided.requires_grad_()
        found = op(leaf, targets.repeat_interleave(2)[::2], 1.0)
        weights = torch.linspace(-1, 2, len(targets))
        (gradient,) = torch.autograd.grad(
            (found * weights.repeat_interleave(3)[::3]).sum(), leaf, retain_graph=False
        )
        wanted, wanted_gradient = exact(logits, targets, 1.0, weights)
        torch.testing.assert_close(found.detach().double(), wanted, **FP32)
        torch.testing.assert_close(gradient.double(), wanted_gradient, **FP32)
    _, gradient = computed(op, logits, targets, 1.0, torch.ones(()).expand(len(targets)))
    torch.testing.assert_close(
        gradient.double(), exact(logits, targets, 1.0, torch.ones(len(targets)))[1], **FP32
    )


def check_rerun(op: Logprob) -> None:
    """Two runs are bitwise equal."""
    logits, targets = nasty_rows(VOCABULARIES[-1])
    grad = torch.randn(len(targets), generator=torch.Generator().manual_seed(3))
    first, second = (computed(op, logits, targets, 0.8, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_no_grad_and_empty(op: Logprob) -> None:
    logits, targets = nasty_rows(7)
    with torch.no_grad():
        assert not op(logits.clone().requires_grad_(), targets, 1.0).requires_grad
    found, gradient = computed(op, logits[:0], targets[:0], 1.0, torch.ones(0))
    assert (found.shape, gradient.shape) == ((0,), (0, 7))


CHECKS: dict[str, Callable[[Logprob], None]] = {
    function.__name__.removeprefix("check_"): function
    for function in (
        check_values_and_gradients,
        check_half_precision,
        check_never_above_zero,
        check_gradient_rows_sum_to_zero,
        check_tokens_stand_alone,
        check_strides,
        check_rerun,
        check_no_grad_and_empty,
    )
}
