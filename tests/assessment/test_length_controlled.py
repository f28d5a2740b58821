"""The length-controlled win rate against a fit written out with scipy, and on annotations whose truth is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.optimize import minimize

from metareward.assessment.interval import Resampling
from metareward.errors import UserError

pytest.importorskip("sklearn", reason="the length-controlled win rate needs scikit-learn")

from metareward.assessment.length_controlled import (
    FEWEST_PROMPTS,
    STRENGTHS,
    fit,
    length_controlled,
    standardised,
)

NONE = Resampling(0)


def annotations(
    prompts: int, model: float, length: float, difficulty: float = 0.0, shift: int = 0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Made-up annotations: preferences (0 or 1), both lengths, difficulties, and the true win rate at equal lengths."""
    rng = np.random.default_rng(seed)
    baseline = rng.integers(500, 2000, prompts)
    own = np.maximum(1, baseline + rng.normal(shift, 600, prompts).astype(int))
    gap = own - baseline
    hard = rng.normal(size=prompts)
    even = model + difficulty * hard
    p = 1 / (1 + np.exp(-(even + length * np.tanh(gap / gap.std(ddof=1)))))
    return (
        (rng.random(prompts) < p).astype(float),
        own,
        baseline,
        hard,
        float(np.mean(1 / (1 + np.exp(-even)))),
    )


def test_against_a_fit_written_out() -> None:
    """The likelihood as the docstring has it, minimised by scipy from another start, with soft preferences and counts."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(70, 2)), rng.choice([0.0, 0.3, 0.5, 1.0], 70)
    counts = rng.integers(0, 4, 70).astype(float)
    for strength in (1e-4, 0.1, 1.0, 50.0):

        def loss(theta: np.ndarray, strength: float = strength) -> float:
            z = theta[0] + x @ theta[1:]
            log_p, log_q = -np.logaddexp(0, -z), -np.logaddexp(0, z)
            return float(
                -(counts * (y * log_p + (1 - y) * log_q)).sum() + strength / 2 * (theta[1:] ** 2).sum()
            )

        expected = minimize(loss, rng.normal(size=3), method="BFGS", options={"gtol": 1e-8}).x
        model, slopes = fit(x, y, counts, strength)
        assert [model, *slopes] == pytest.approx(expected.tolist(), abs=2e-5)


@pytest.mark.parametrize(
    ("model", "length", "difficulty"), [(0.0, 2.0, 0.0), (-0.8, 1.0, 0.0), (0.5, -1.5, 0.7)]
)
def test_the_truth_is_found_where_the_raw_win_rate_misses_it(
    model: float, length: float, difficulty: float
) -> None:
    y, own, baseline, hard, truth = annotations(4000, model, length, difficulty, shift=700)
    given = hard if difficulty else None
    found = length_controlled(y, own, baseline, given, Resampling(250, 0.999))
    assert found.win_rate.interval is not None
    assert found.win_rate.interval.low < truth < found.win_rate.interval.high
    raw_error = abs(y.mean() - truth)
    assert raw_error > 0.08
    assert abs(found.win_rate.value - truth) < raw_error / 3  # type: ignore[operator]
    assert found.coefficients is not None
    assert found.coefficients.length == pytest.approx(length, abs=0.3)
    assert found.coefficients.model == pytest.approx(model, abs=0.25)
    if difficulty:
        # Per standard deviation of difficulty, which is 1 in these annotations.
        assert found.coefficients.difficulty == pytest.approx(difficulty, abs=0.2)
    else:
        assert found.coefficients.difficulty is None


def test_without_a_length_effect_it_is_the_win_rate() -> None:
    y, own, _, _, _ = annotations(60, 0.4, 0.0)
    soft = 0.2 + 0.6 * y
    found = length_controlled(soft, own, own, None, NONE)
    assert found.win_rate.value == pytest.approx(soft.mean())
    assert found.length_sd == 0.0
    # Lengths that differ but say nothing: the ridge is strong and the figure stays.
    noisy = length_controlled(soft, own[::-1], own, None, NONE)
    assert noisy.win_rate.value == pytest.approx(soft.mean(), abs=0.05)


def test_swapping_the_models_turns_it_round() -> None:
    y, own, baseline, hard, _ = annotations(120, 0.6, 1.0, 0.5, shift=300)
    one = length_controlled(y, own, baseline, hard, NONE)
    # A difficulty that raises one model's chance lowers the other's: its coefficient turns too.
    two = length_controlled(1 - y, baseline, own, hard, NONE)
    assert one.win_rate.value == pytest.approx(1 - two.win_rate.value, abs=1e-6)  # type: ignore[operator]
    assert one.coefficients.length == pytest.approx(two.coefficients.length, abs=1e-5)  # type: ignore[union-attr]


def test_one_side_always_wins() -> None:
    rng = np.random.default_rng(0)
    own, baseline = rng.integers(1, 99, 30), rng.integers(1, 99, 30)
    for value in (0.0, 1.0):
        found = length_controlled(np.full(30, value), own, baseline, None, Resampling(50))
        assert found.win_rate.value == value
        assert found.win_rate.interval is not None
        assert (found.win_rate.interval.low, found.win_rate.interval.high) == (value, value)
    # All but one: folds and draws without it have one side only.
    nearly = length_controlled([0.0] + [1.0] * 29, own, baseline, None, Resampling(80))
    assert nearly.win_rate.value is not None
    assert 0.8 < nearly.win_rate.value < 1.0
    # All ties.
    assert length_controlled([0.5] * 30, own, baseline, None, NONE).win_rate.value == pytest.approx(0.5)


def test_preferences_that_length_fixes() -> None:
    own = np.arange(40) * 10
    y = (own > 195).astype(float)
    found = length_controlled(y, own, np.full(40, 195), None, NONE)
    assert found.win_rate.value == pytest.approx(0.5, abs=0.02)
    assert found.strength == STRENGTHS[-1]


def test_too_few_and_wrong_input() -> None:
    few = FEWEST_PROMPTS - 1
    assert length_controlled([1.0] * few, [1] * few, [2] * few, None, NONE).win_rate.value is None
    for arguments in (
        ([1.2] * 12, [1] * 12, [2] * 12, None),
        ([1.0] * 12, [1] * 11, [2] * 11, None),
        ([1.0] * 12, [1] * 12, [2] * 12, [0.0] * 11),
        ([1.0] * 12, [1] * 12, [2] * 12, [float("nan")] * 12),
    ):
        with pytest.raises(ValueError, match=r"outside|differ|finite"):
            length_controlled(*arguments, NONE)
    assert standardised(np.full(5, 3.0)).tolist() == [0.0] * 5


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match=r"needs scikit-learn: pip install"):
        length_controlled([1.0, 0.0] * 10, list(range(20)), [5] * 20, None, NONE)
