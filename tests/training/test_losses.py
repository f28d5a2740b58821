"""The pair losses against formulas written out anew, and the figures that the objectives report."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metareward_kernels.pair_losses import PairLogprobs, PairLoss, dpo, hinge, ipo
from torch import Tensor

from metareward.config import TrainSettings
from metareward.training.examples import Example
from metareward.training.losses import pair_loss
from metareward.training.objectives import pair_objective, sft_objective
from metareward.training.packing import pack

RATIO = st.floats(-30.0, 30.0)


def pairs_of(chosen: Tensor, rejected: Tensor) -> PairLogprobs:
    """Pairs with these log ratios, under a reference that is not zero."""
    references = torch.full_like(chosen, -3.0), torch.full_like(rejected, -5.0)
    tokens = torch.ones_like(chosen)
    return PairLogprobs(chosen + references[0], rejected + references[1], *references, tokens, tokens)


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def formula(settings: TrainSettings, chosen: float, rejected: float) -> float:
    margin = chosen - rejected
    if settings.loss == "ipo":
        return (margin - 0.5 / settings.beta) ** 2
    if settings.loss == "hinge":
        return max(0.0, 1.0 - settings.beta * margin)
    e = settings.label_smoothing
    right, swapped = sigmoid(settings.beta * margin), sigmoid(-settings.beta * margin)
    return -(1.0 - e) * math.log(right) - e * math.log(swapped)


SETTINGS = [
    TrainSettings(loss="dpo", beta=0.1),
    TrainSettings(loss="dpo", beta=0.5, label_smoothing=0.2),
    TrainSettings(loss="ipo", beta=0.1),
    TrainSettings(loss="ipo", beta=2.0),
    TrainSettings(loss="hinge", beta=0.1),
]
NAMES = ["dpo", "dpo smoothed", "ipo", "ipo beta 2", "hinge"]


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
@given(pairs=st.lists(st.tuples(RATIO, RATIO), min_size=1, max_size=4))
def test_loss_by_formula(settings: TrainSettings, pairs: list[tuple[float, float]]) -> None:
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    found = pair_loss(settings)(pairs_of(chosen, rejected))
    assert found.dtype == torch.float64
    assert found.shape == (len(pairs),)
    for value, pair in zip(found.tolist(), pairs, strict=True):
        assert value == pytest.approx(formula(settings, *pair), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
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


def test_extreme_margins_stay_finite() -> None:
    far = torch.tensor([1e5, -1e5], dtype=torch.float64)
    found = dpo(pairs_of(far, -far), beta=0.1)
    assert found.tolist() == pytest.approx([0.0, 2e4])


def pair(identity: str, kind: str = "actor") -> Example:
    return Example(identity, kind, (2, 3), ((4,), (5, 6)))


def figures(
    settings: TrainSettings, sums: list[float], reference: dict[str, tuple[float, float]]
) -> dict[str, float]:
    names = [("a", "actor"), ("b", "judge"), ("c", "judge")]
    batch = pack([pair(name, kind) for name, kind in names], torch.device("cpu"))
    objective = pair_objective(settings, reference)
    loss, totals = objective.loss(batch, torch.tensor(sums, dtype=torch.float64))
    assert float(loss) == pytest.approx(totals["loss"])
    return objective.report(totals, sum(objective.weight(item) for item in batch.examples))


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
    examples = [Example("a", "judge", (2,), ((3, 4, 5),)), Example("b", "judge", (2,), ((6,),))]
    objective = sft_objective()
    loss, totals = objective.loss(
        pack(examples, torch.device("cpu")), torch.tensor([-6.0, -4.0], dtype=torch.float64)
    )
    weight = sum(objective.weight(item) for item in examples)
    assert float(loss) == 10.0
    assert objective.report(totals, weight) == {"loss": 2.5}
