"""What dpo_loss must hold, as functions of the op: for PyTorch (test_dpo_loss.py), for Triton (tests/interpreter) and for the
mistake tests. The oracle goes sequence by sequence and pair by pair in fp64, with the formulas of `pair_losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from metareward_kernels import DpoLoss, pair_losses
from torch import Tensor

Dpo = Callable[..., DpoLoss]
LOSSES: list[tuple[str, float]] = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0)]


class Case(NamedTuple):
    logprobs: Tensor  # [T]
    cu_seqlens: Tensor  # [S+1]
    pairs: Tensor  # [P,2]
    reference: Tensor  # [S]


def make(lengths: list[int], pairs: list[tuple[int, int]], scale: float = 1.0) -> Case:
    """References near the sequences' own sums, so that margins are of order one (times scale)."""
    generator = torch.Generator().manual_seed(sum(lengths) + len(pairs))
    logprobs = -torch.rand(sum(lengths), generator=generator) * 4
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    sums = torch.tensor([float(part.double().sum()) for part in logprobs.split(lengths)], dtype=torch.float64)
    reference = (sums + scale * torch.randn(len(lengths), generator=generator, dtype=torch.float64)).float()
    return Case(logprobs, cu_seqlens, torch.tensor(pairs, dtype=torch.int64).view(-1, 2), reference)


# Sequences of 0, 1, many tokens; 3 in no pair, 1 in three, 5 chosen here and rejected there; a pair of one with itself.
TANGLED = make([7, 20, 0, 12, 1, 13, 25, 16], [(1, 0), (1, 2), (4, 1), (5, 6), (7, 5), (6, 6)])


def oracle(
    case: Case, beta: float, loss: str, label_smoothing: float, grad_losses: Tensor, grad_sums: Tensor
) -> tuple[DpoLoss, Tensor]:
    """The fields in fp64, and the gradient of sum(grad_losses * losses) + sum(grad_sums * logprobs)."""
    leaf = case.logprobs.double().requires_grad_()
    bounds = case.cu_seqlens.tolist()
    sums = [leaf[begin:end].sum() for begin, end in pairwise(bounds)]
    losses, rewards = [], []
    for chosen, rejected in case.pairs.tolist():
        record = pair_losses.PairLogprobs(
            sums[chosen],
            sums[rejected],
            case.reference[chosen].double(),
            case.reference[rejected].double(),
            torch.tensor(bounds[chosen + 1] - bounds[chosen]),
            torch.tensor(bounds[rejected + 1] - bounds[rejected]),
        )
        if loss == "sigmoid":
            losses.append(pair_losses.dpo(record, beta=beta, label_smoothing=label_smoothing))
        else:
            losses.append({"ipo": pair_losses.ipo, "hinge": pair_losses.hinge}[loss](record, beta=beta))
        rewards.append((beta * record.chosen_ratio, beta * record.rejected_ratio))
    total = sum((g * x for g, x in zip(grad_losses.double(), losses, strict=True)), leaf.sum() * 0)
    total = sum((g * x for g, x in zip(grad_sums.double(), sums, strict=True)), total)
    (gradient,) = torch.autograd.grad(total, leaf)

    def vector(values: Any) -> Tensor:
        return torch.tensor([value.item() for value in values], dtype=torch.float64)

    fields = DpoLoss(
        vector(losses),
        vector(sums),
        vector(chosen for chosen, _ in rewards),
        vector(rejected for _, rejected in rewards),
        vector(chosen - rejected for chosen, rejected in rewards),
    )
    return fields, gradient


def computed(
    dpo_loss: Dpo, case: Case, grad_losses: Tensor, grad_sums: Tensor, **settings: Any
) -> tuple[DpoLoss, Tensor]:
    leaf = case.logprobs.detach().clone().requires_grad_()
    found = dpo_loss(leaf, *case[1:], **settings)
    ((found.losses * grad_losses).sum() + (found.logprobs * grad_sums).sum()).backward()
    assert leaf.grad is not None
    assert not any(part.requires_grad for part in found[2:])
    return DpoLoss(*(part.detach() for part in found)), leaf.grad


def weights(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(len(case.pairs), generator=generator), torch.randn(
        len(case.reference), generator=generator
    )


def assert_right(
    dpo_loss: Dpo, case: Case, rtol: float = 1e-5, atol: float = 1e-5, beta: float = 0.3
) -> None:
    grad_losses, grad_sums = weights(case)
    for loss, label_smoothing in LOSSES:
        settings = {"beta": beta, "loss": loss, "label_smoothing": label_smoothing}
        found, gradient = computed(dpo_loss, case, grad_losses, grad_sums, **settings)
        wanted, wanted_gradient = oracle(case, beta, loss, label_smoothing, grad_losses, grad_sums)
        for name, ours, true in zip(DpoLoss._fields, found, wanted, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(
                ours.double(), true, rtol=rtol, atol=atol, msg=f"{loss}: {name} is {ours}, not {true}"
            )
        torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=rtol, atol=atol)


def check_losses_rewards_and_gradients(dpo_loss: Dpo) -> None:
    assert_right(dpo_loss, TANGLED)
    assert_right(dpo_loss, make([40], [(0, 0)]))
    narrow = TANGLED._replace(cu_seqlens=TANGLED.cu_seqlens.int(), pairs=TANGLED.pairs.int())
    assert_right(dpo_loss, narrow)


def check_margins_far_from_zero(dpo_loss: Dpo) -> None:
    """Losses down to e^-60 keep their digits, and large ones do not overflow."""
    case = make([3, 3, 5], [(0, 1), (1, 0), (0, 2), (2, 1), (1, 2)])
    for gap in (1.0, 15.0, 60.0, 2000.0):
        sums = torch.stack([part.sum() for part in case.logprobs.split([3, 3, 5])])
        far = case._replace(reference=sums - torch.tensor([gap, 0.0, -gap]))
        grad_losses, grad_sums = torch.ones(5), torch.zeros(3)
        for loss, label_smoothing in LOSSES:
            settings = {"beta": 1.0, "loss": loss, "label_smoothing": label_smoothing}
            found, gradient = computed(dpo_loss, far, grad_losses, grad_sums, **settings)
            wanted, wanted_gradient = oracle(far, 1.0, loss, label_smoothing, grad_losses, grad_sums)
            torch.testing.assert_close(found.losses.double(), wanted.losses, rtol=2e-5, atol=1e-36)
            scale = 1.0 + float(wanted_gradient.abs().max())  # what cancels in a sequence of several pairs
            torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=2e-5, atol=2e-6 * scale)


def check_sums_are_rounded_once(dpo_loss: Dpo) -> None:
    """Log-probs of very different sizes, whose rounding errors would add up; the fp64 sum to half a step."""
    generator = torch.Generator().manual_seed(5)
    sizes = 10.0 ** torch.randint(-6, 3, (6, 60), generator=generator)
    logprobs = -torch.rand(6, 60, generator=generator) * sizes
    cu_seqlens = torch.arange(0, 361, 60)
    case = Case(logprobs.flatten(), cu_seqlens, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(6))
    found = dpo_loss(*case, beta=0.1).logprobs
    exact = logprobs.double().sum(dim=1)
    assert ((found.double() - exact).abs() <= exact.abs() * 2.0**-24).all()


def check_empty_inputs(dpo_loss: Dpo) -> None:
    for case in (make([0, 0], [(0, 1)]), make([3, 0], [])):
        assert_right(dpo_loss, case)
    none = Case(
        torch.zeros(0),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(0),
    )
    found, gradient = computed(dpo_loss, none, torch.zeros(0), torch.zeros(0), beta=0.1)
    assert all(part.shape == (0,) for part in (*found, gradient))


def check_strides(dpo_loss: Dpo) -> None:
    """Everything a view of something wider; the gradient of a sum, which has stride 0."""
    case = Case(
        TANGLED.logprobs.repeat_interleave(2)[::2],
        TANGLED.cu_seqlens.repeat_interleave(3)[::3],
        TANGLED.pairs.T.contiguous().T,
        TANGLED.reference.repeat_interleave(2)[::2],
    )
    assert_right(dpo_loss, case)
    ones, zeros = torch.ones(len(case.pairs)), torch.zeros(len(case.reference))
    leaf = case.logprobs.requires_grad_()
    dpo_loss(leaf, *case[1:], beta=0.3).losses.sum().backward()
    wanted = oracle(TANGLED, 0.3, "sigmoid", 0.0, ones, zeros)[1]
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def check_nan_stays_in_its_pairs(dpo_loss: Dpo) -> None:
    logprobs = TANGLED.logprobs.clone()
    logprobs[3] = math.nan  # of sequence 0, which pair 0 alone names
    grad_losses, grad_sums = weights(TANGLED)
    for loss, label_smoothing in LOSSES:
        settings = {"beta": 0.3, "loss": loss, "label_smoothing": label_smoothing}
        clean, clean_gradient = computed(dpo_loss, TANGLED, grad_losses, grad_sums, **settings)
        found, gradient = computed(
            dpo_loss, TANGLED._replace(logprobs=logprobs), grad_losses, grad_sums, **settings
        )
        assert found.losses.isnan().tolist() == [True] + [False] * 5
        assert torch.equal(found.losses[1:], clean.losses[1:])
        assert torch.equal(gradient[27:], clean_gradient[27:])  # past the sequences that pair 0 names


def check_impossible_tokens(dpo_loss: Dpo) -> None:
    """A log-prob of -inf gives a sum of -inf and an infinite loss, not NaN."""
    case = make([3, 4], [(0, 1)])
    case.logprobs[1] = -math.inf
    for loss in ("sigmoid", "hinge", "ipo"):
        found = dpo_loss(*case, beta=0.3, loss=loss)
        assert found.logprobs[0] == -math.inf
        assert found.losses[0] == math.inf


def check_rerun(dpo_loss: Dpo) -> None:
    grad_losses, grad_sums = weights(TANGLED)
    first, second = (computed(dpo_loss, TANGLED, grad_losses, grad_sums, beta=0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert torch.equal(first[1], second[1])


CHECKS: dict[str, Callable[[Dpo], None]] = {
    function.__name__.removeprefix("check_"): function
    for function in (
        check_losses_rewards_and_gradients,
        check_margins_far_from_zero,
        check_sums_are_rounded_once,
        check_empty_inputs,
        check_strides,
        check_nan_stays_in_its_pairs,
        check_impossible_tokens,
        check_rerun,
    )
}
