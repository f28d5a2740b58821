"""The pair losses against formulas written out anew, and the figures that the objectives report."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from metareward_kernels import linear_preference
from metareward_kernels.pair_losses import (
    PairLogprobs,
    PairLoss,
    chosen_nll,
    dpo,
    dpo_norm,
    hinge,
    ipo,
    simpo,
    sppo,
)
from torch import Tensor

from metareward.config import TrainSettings
from metareward.training.examples import Example
from metareward.training.losses import pair_loss, rewards, uses_reference
from metareward.training.objectives import pair_objective, sft_objective
from metareward.training.packing import pack

RATIO = st.floats(-30.0, 30.0)


CHOSEN_REFERENCE, REJECTED_REFERENCE = -3.0, -5.0
CHOSEN_TOKENS, REJECTED_TOKENS = 4, 7


def pairs_of(chosen: Tensor, rejected: Tensor) -> PairLogprobs:
    """Pairs with these log ratios, under references and of lengths that differ."""

    def constant(value: float) -> Tensor:
        return torch.full_like(chosen, value)

    return PairLogprobs(
        chosen + CHOSEN_REFERENCE,
        rejected + REJECTED_REFERENCE,
        constant(CHOSEN_REFERENCE),
        constant(REJECTED_REFERENCE),
        constant(CHOSEN_TOKENS),
        constant(REJECTED_TOKENS),
    )


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def formula(settings: TrainSettings, chosen: float, rejected: float) -> float:
    """The loss of one pair with these log ratios, in plain numbers."""
    beta, chosen_logprob = settings.beta, chosen - 3.0
    nll = settings.nll_weight * -chosen_logprob / 4
    if settings.loss == "ipo":
        return (chosen - rejected - 0.5 / beta) ** 2 + nll
    if settings.loss == "hinge":
        return max(0.0, 1.0 - beta * (chosen - rejected)) + nll
    if settings.loss == "sppo":
        return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2 + nll
    if settings.loss == "dpo":
        logit = beta * (chosen - rejected)
    elif settings.loss == "dpo_norm":
        logit = beta * chosen / 4 - beta * rejected / 7
    else:
        assert settings.loss == "simpo"
        logit = beta / 4 * (chosen - 3.0) - beta / 7 * (rejected - 5.0) - settings.simpo_gamma
    e = settings.label_smoothing
    return -(1.0 - e) * math.log(sigmoid(logit)) - e * math.log(sigmoid(-logit)) + nll


SETTINGS = {
    "dpo": TrainSettings(loss="dpo", beta=0.1),
    "dpo smoothed": TrainSettings(loss="dpo", beta=0.5, label_smoothing=0.2),
    "dpo_norm": TrainSettings(loss="dpo_norm", beta=5.0),
    "dpo_norm smoothed": TrainSettings(loss="dpo_norm", beta=0.5, label_smoothing=0.3),
    "simpo": TrainSettings(loss="simpo", beta=2.0, simpo_gamma=1.2),
    "simpo smoothed, no margin": TrainSettings(loss="simpo", beta=2.0, label_smoothing=0.1),
    "ipo": TrainSettings(loss="ipo", beta=0.1),
    "ipo beta 2": TrainSettings(loss="ipo", beta=2.0),
    "hinge": TrainSettings(loss="hinge", beta=0.1),
    "sppo": TrainSettings(loss="sppo", beta=0.05),
    "dpo with nll": TrainSettings(loss="dpo", beta=0.1, nll_weight=0.7),
    "simpo with nll": TrainSettings(loss="simpo", beta=2.0, simpo_gamma=0.5, nll_weight=1.5),
}
EVERY_LOSS = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def test_every_loss_of_the_recipe_is_tested() -> None:
    choices = get_args(get_type_hints(TrainSettings)["loss"])
    assert {settings.loss for settings in SETTINGS.values()} == set(choices)


@EVERY_LOSS
@effort(max_examples=30)
@given(pairs=st.lists(st.tuples(RATIO, RATIO), min_size=1, max_size=4))
def test_loss_by_formula(settings: TrainSettings, pairs: list[tuple[float, float]]) -> None:
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    found = pair_loss(settings)(pairs_of(chosen, rejected))
    assert found.dtype == torch.float64
    assert found.shape == (len(pairs),)
    for value, pair in zip(found.tolist(), pairs, strict=True):
        assert value == pytest.approx(formula(settings, *pair), rel=1e-12, abs=1e-12)


@EVERY_LOSS
def test_gradients(settings: TrainSettings) -> None:
    generator = torch.Generator().manual_seed(0)
    # Away from the hinge's kink at margin = 10.
    inputs = [torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *ratios: pair_loss(settings)(pairs_of(*ratios)), inputs)


def test_gradient_of_dpo_at_equal_logprobs() -> None:
    chosen = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    dpo(pairs_of(chosen, rejected), beta=0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-0.05] * 3)
    assert rejected.grad.tolist() == pytest.approx([0.05] * 3)


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        (lambda p: dpo(p, beta=0.1), math.log(2)),
        (lambda p: dpo(p, beta=0.1, label_smoothing=0.3), math.log(2)),
        (lambda p: ipo(p, beta=0.1), 25.0),
        (lambda p: hinge(p, beta=0.1), 1.0),
    ],
)
def test_loss_at_equal_logprobs(loss: PairLoss, wanted: float) -> None:
    ratios = torch.tensor([0.0, -3.5, 12.0], dtype=torch.float64)
    assert loss(pairs_of(ratios, ratios)).tolist() == pytest.approx([wanted] * 3, rel=1e-12)


# Numbers worked out by hand: log ratios +2 and -1, of completions of 4 and 7 tokens whose log-probs are -1 and -6.
@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        # 1/2 + 1/7 = 9/14, times 2: log(1 + e^(-9/7)).
        (lambda p: dpo_norm(p, beta=2.0), 0.24409),
        # -1/4 + 6/7 = 17/28, times 2, less 1: log(1 + e^(-3/14)).
        (lambda p: simpo(p, beta=2.0, gamma=1.0), 0.59173),
        # (2 - 5)^2 + (-1 + 5)^2
        (lambda p: sppo(p, beta=0.1), 25.0),
        (chosen_nll, 0.25),
    ],
)
def test_loss_by_hand(loss: PairLoss, wanted: float) -> None:
    one = pairs_of(torch.tensor([2.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64))
    assert loss(one).tolist() == pytest.approx([wanted], abs=1e-5)


def test_simpo_reads_no_reference() -> None:
    ratios = torch.tensor([1.0, -2.0], dtype=torch.float64)
    pairs = pairs_of(ratios, -ratios)
    nothing = torch.full_like(ratios, math.nan)
    blind = pairs._replace(chosen_reference=nothing, rejected_reference=nothing)
    settings = TrainSettings(loss="simpo", beta=2.0, simpo_gamma=1.0, nll_weight=0.5)
    assert torch.equal(pair_loss(settings)(blind), pair_loss(settings)(pairs))
    for found, wanted in zip(rewards(settings, blind), rewards(settings, pairs), strict=True):
        assert torch.equal(found, wanted)
    assert not uses_reference(settings)
    assert uses_reference(TrainSettings(loss="dpo_norm"))


@EVERY_LOSS
@pytest.mark.parametrize("chunk_tokens", [4, 64])
def test_loss_through_the_head(settings: TrainSettings, chunk_tokens: int) -> None:
    """linear_preference with this loss, against autograd through all logits. A chunk of 4 tokens is shorter than any pair."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = [3, 5, 6, 1]
    starts = [0, *accumulate(lengths)]
    hidden, weight = randn(15, 6).requires_grad_(), randn(23, 6).requires_grad_()
    targets = torch.randint(0, 23, (15,), generator=generator)
    reference, pair_weights = randn(4) * 2 - 10, torch.tensor([0.5, 0.2], dtype=torch.float64)
    found = linear_preference(
        hidden,
        weight,
        targets,
        torch.tensor(starts),
        torch.arange(4).view(2, 2),
        reference,
        pair_loss(settings),
        pair_weights=pair_weights,
        chunk_tokens=chunk_tokens,
    )
    gradients = torch.autograd.grad(found.loss, (hidden, weight))
    logprobs = torch.log_softmax(hidden @ weight.T, 1)[torch.arange(15), targets]
    total = torch.zeros((), dtype=torch.float64)
    for p in range(2):
        sides = [logprobs[starts[s] : starts[s + 1]].sum() for s in (2 * p, 2 * p + 1)]
        pair = [*sides, reference[2 * p], reference[2 * p + 1]]
        tokens = [torch.tensor(float(lengths[2 * p + side])).double() for side in (0, 1)]
        total = total + pair_weights[p] * pair_loss(settings)(PairLogprobs(*pair, *tokens))
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-12)
    for ours, true in zip(gradients, torch.autograd.grad(total, (hidden, weight)), strict=True):
        assert true.abs().max() > 0
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)


def test_extreme_margins_stay_finite() -> None:
    far = torch.tensor([1e5, -1e5], dtype=torch.float64)
    found = dpo(pairs_of(far, -far), beta=0.1)
    assert found.tolist() == pytest.approx([0.0, 2e4])


KINDS = (("a", "actor"), ("b", "judge"), ("c", "judge"))
VOCABULARY = 11


def head_of(logprobs: list[float]) -> tuple[Tensor, Tensor]:
    """hidden [R,R] and head [VOCABULARY,R] for which row r gives probability exp(logprobs[r]) to its target, r % 7."""
    hidden = torch.eye(len(logprobs), dtype=torch.float64)
    head = torch.empty(VOCABULARY, len(logprobs), dtype=torch.float64)
    for row, value in enumerate(logprobs):
        head[:, row] = math.log(-math.expm1(value) / (VOCABULARY - 1))
        head[row % 7, row] = value
    return hidden.requires_grad_(), head.requires_grad_()


def figures(
    settings: TrainSettings, sums: list[float], reference: dict[str, tuple[float, float]]
) -> dict[str, float]:
    """Figures of three pairs with these log-probs; chosen completions have one token, rejected ones two."""
    examples = [Example(name, kind, (2, 3), ((0,), (0, 0))) for name, kind in KINDS]
    batch = pack(examples, torch.device("cpu"))
    batch = replace(batch, targets=torch.arange(9) % 7)
    # A rejected completion's tokens have a third and two thirds of its log-prob.
    tokens = [
        part for at in range(3) for part in (sums[2 * at], sums[2 * at + 1] / 3, sums[2 * at + 1] * 2 / 3)
    ]
    hidden, head = head_of(tokens)
    objective = pair_objective(settings, reference)
    loss, totals = objective.loss(batch, hidden, head, 0.25)
    assert float(loss.detach()) == pytest.approx(0.25 * totals["loss"])
    report = objective.report(totals, sum(objective.weight(item) for item in batch.examples))
    assert report["entropy"] == pytest.approx(sum(entropy_of(value) for value in tokens) / 9)
    return report


def entropy_of(logprob: float) -> float:
    """Of a token of probability p, where the others share the rest evenly."""
    rest = -math.expm1(logprob)
    return -math.exp(logprob) * logprob - rest * math.log(rest / (VOCABULARY - 1))


def test_figures_of_pairs_by_hand() -> None:
    reference = {"a": (-10.0, -20.0), "b": (-30.0, -30.0), "c": (-5.0, -6.0)}
    # Log ratios: a (+4, -6), b (-2, -1), c (0, -5).
    report = figures(TrainSettings(beta=0.1), [-6.0, -26.0, -32.0, -31.0, -5.0, -11.0], reference)
    margins = [1.0, -0.1, 0.5]
    assert report["loss"] == pytest.approx(sum(-math.log(sigmoid(margin)) for margin in margins) / 3)
    assert report["margin"] == pytest.approx(1.4 / 3)
    assert report["accuracy"] == pytest.approx(2 / 3)
    assert report["accuracy_actor"] == 1.0
    assert report["accuracy_judge"] == 0.5
    assert report["margin_actor"] == pytest.approx(1.0)
    assert report["margin_judge"] == pytest.approx(0.2)
    assert report["chosen_logprob"] == pytest.approx(-43.0 / 3)
    assert report["rejected_logprob"] == pytest.approx(-68.0 / 3)


def test_rewards_and_margins_are_the_losses_own() -> None:
    """Length-normalised losses compare rewards a token (chosen has one, rejected two); SimPO compares log-probs."""
    reference = {"a": (-10.0, -20.0), "b": (-30.0, -30.0), "c": (-5.0, -6.0)}
    sums = [-6.0, -26.0, -32.0, -31.0, -5.0, -11.0]
    norm = figures(TrainSettings(loss="dpo_norm", beta=2.0), sums, reference)
    # Log ratios a token: a (+4, -3), b (-2, -0.5), c (0, -2.5).
    assert norm["margin"] == pytest.approx(2.0 * (7.0 - 1.5 + 2.5) / 3)
    assert norm["accuracy"] == pytest.approx(2 / 3)
    # Log-probs a token: a (-6, -13), b (-32, -15.5), c (-5, -5.5). There is no reference to look up.
    simpo = figures(TrainSettings(loss="simpo", beta=2.0, simpo_gamma=1.0, nll_weight=0.5), sums, {})
    margins = [2.0 * (7.0), 2.0 * (-16.5), 2.0 * 0.5]
    assert simpo["margin"] == pytest.approx(sum(margins) / 3)
    assert simpo["accuracy"] == pytest.approx(2 / 3)
    assert simpo["chosen_nll"] == pytest.approx((6.0 + 32.0 + 5.0) / 3)
    wanted = sum(math.log1p(math.exp(-(margin - 1.0))) for margin in margins) / 3 + 0.5 * 43.0 / 3
    assert simpo["loss"] == pytest.approx(wanted)


def test_swapping_chosen_and_rejected_negates_the_margin() -> None:
    reference = dict.fromkeys("abc", (-3.0, -3.0))
    sums = [-1.0, -4.0, -2.0, -2.5, -1.0, -9.0]
    swapped = [-4.0, -1.0, -2.5, -2.0, -9.0, -1.0]
    right, wrong = (figures(TrainSettings(beta=0.1), part, reference) for part in (sums, swapped))
    assert right["margin"] > 0
    assert wrong["margin"] == pytest.approx(-right["margin"])
    assert (right["accuracy"], wrong["accuracy"]) == (1.0, 0.0)
    assert wrong["loss"] > math.log(2) > right["loss"]


def test_sft_is_the_mean_over_target_tokens() -> None:
    examples = [Example("a", "judge", (2,), ((0, 1, 2),)), Example("b", "judge", (2,), ((3,),))]
    objective = sft_objective()
    hidden, head = head_of([-1.0, -2.0, -3.0, -4.0])
    loss, totals = objective.loss(pack(examples, torch.device("cpu")), hidden, head, 3.0)
    weight = sum(objective.weight(item) for item in examples)
    assert float(loss.detach()) == pytest.approx(30.0)
    report = objective.report(totals, weight)
    assert report["loss"] == pytest.approx(2.5)
    assert report["entropy"] == pytest.approx(sum(entropy_of(-float(at)) for at in (1, 2, 3, 4)) / 4)
