"""Length-controlled win rate: what the win rate would be if both models wrote equally long responses.

The form of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475): logistic regression of the preference for the model, a probability
in [0, 1], on a model term, on tanh(length difference / its standard deviation), and on the difficulty of the prompt where it is
known; the figure is the mean prediction over the prompts with the length term at 0.

    P(model preferred on prompt x) = sigmoid(model + length tanh((len_model(x) - len_baseline(x)) / sd) + difficulty d(x))

The ridge is on the length and the difficulty term and is chosen by cross-validation over prompts. The model term is what is
estimated and has none: without a length effect the figure is then exactly the win rate. AlpacaEval's own program differs in that it
penalises every term (by L1) and adds annotations of two manipulated baselines that belong to its 805 prompts, so figures are alike,
not equal. Fits are scikit-learn's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metareward.assessment.interval import Estimate, Indices, Interval, Resampling, percentile_interval
from metareward.errors import UserError

FOLDS = 5
# Two prompts a fold at least; fewer would choose the ridge by single preferences.
FEWEST_PROMPTS = 2 * FOLDS
STRENGTHS = tuple(float(value) for value in np.logspace(4, -4, 17))
"""Weights of lambda / 2 |coefficients|^2 beside the summed log loss, strongest first."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Coefficients:
    """In log odds: `model` at equal lengths and mean difficulty; `length` a unit of tanh (positive: longer is preferred);
    `difficulty` a standard deviation of difficulty, None where it was not given. `model` is None where one side always wins, which
    would make it infinite."""

    model: float | None
    length: float
    difficulty: float | None


@dataclass(frozen=True)
class LengthControlled:
    """`win_rate`: None where there are fewer than FEWEST_PROMPTS prompts. `length_sd`: standard deviation of the length difference,
    in characters. `strength`: the ridge that cross-validation chose."""

    win_rate: Estimate
    coefficients: Coefficients | None = None
    length_sd: float | None = None
    strength: float | None = None


def length_controlled(
    preferences: Sequence[float],
    lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    difficulty: Sequence[float] | None,
    resampling: Resampling,
) -> LengthControlled:
    """The length-controlled win rate of one comparison a prompt.

    The interval draws prompts, and fits anew at the ridge chosen for all of them.

    Args:
        preferences: [P] in [0, 1], 1 where the model is preferred.
        lengths: [P] characters of the model's responses.
        baseline_lengths: [P] characters of the baseline's.
        difficulty: [P] in any unit, or None.

    Raises:
        ValueError: lists of different lengths, a preference outside of [0, 1], or a difficulty that is not finite.
        UserError: scikit-learn is not installed.
        FloatingPointError: a fit did not converge.
    """
    y = np.asarray(preferences, dtype=np.float64)
    gap = np.asarray(lengths, dtype=np.float64) - np.asarray(baseline_lengths, dtype=np.float64)
    if y.shape != gap.shape or (difficulty is not None and len(difficulty) != len(y)):
        raise ValueError("preferences, lengths and difficulty differ in length")
    if not ((y >= 0) & (y <= 1)).all():
        raise ValueError("a preference is outside of [0, 1]")
    if len(y) < FEWEST_PROMPTS:
        return LengthControlled(Estimate(None))
    sd = float(gap.std(ddof=1))
    columns = [np.tanh(gap / sd) if sd > 0 else np.zeros_like(gap)]
    if difficulty is not None:
        columns.append(standardised(np.asarray(difficulty, dtype=np.float64)))
    x = np.stack(columns, axis=1)
    strength = choose_strength(x, y, resampling.seed)
    counts = np.ones(len(y))
    model, slopes = fit(x, y, counts, strength)
    value = at_equal_lengths(x, counts, model, slopes)

    def of_draw(draw: Indices) -> float:
        drawn = np.bincount(draw, minlength=len(y)).astype(np.float64)
        return at_equal_lengths(x, drawn, *fit(x, y, drawn, strength))

    interval: Interval | None = None
    if resampling.resamples:
        interval = percentile_interval(of_draw, len(y), resampling)
    found = Coefficients(
        model if np.isfinite(model) else None,
        float(slopes[0]),
        float(slopes[1]) if len(slopes) > 1 else None,
    )
    return LengthControlled(Estimate(value, interval), found, sd, strength)


def standardised(values: Array) -> Array:
    """Mean 0 and standard deviation 1, or zeros where all are equal.

    Raises:
        ValueError: not all are finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("a difficulty is not a finite number")
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def at_equal_lengths(x: Array, counts: Array, model: float, slopes: Array) -> float:
    """Mean prediction over prompts, each counted so many times, with the length term at 0."""
    return float(
        np.average(predict(np.column_stack([np.zeros(len(x)), x[:, 1:]]), model, slopes), weights=counts)
    )


def predict(x: Array, model: float, slopes: Array) -> Array:
    """[P] probabilities that the model is preferred."""
    return np.exp(-np.logaddexp(0.0, -(model + x @ slopes)))


def fit(x: Array, y: Array, counts: Array, strength: float) -> tuple[float, Array]:
    """(model term, slopes) that minimise

        sum_x counts_x [-y log p - (1 - y) log(1 - p)] + strength / 2 |slopes|^2.

    A preference y is a win with weight y and a loss with weight 1 - y, which gives the same sum.
    """
    share = float(np.average(y, weights=counts))
    if share in (0.0, 1.0):
        # The likelihood grows without end with the model term; the slopes' ridge takes them to 0.
        return (np.inf if share else -np.inf), np.zeros(x.shape[1])
    outcomes = np.repeat([1, 0], len(y))
    weights = np.concatenate([counts * y, counts * (1 - y)])
    used = weights > 0
    estimator = regression()(C=1 / strength, solver="newton-cholesky", tol=1e-8, max_iter=200)
    with warnings.catch_warnings():
        # It warns where it begins at the optimum, as with nothing but ties; the gradient below says whether it got there.
        warnings.simplefilter("ignore")
        estimator.fit(np.concatenate([x, x])[used], outcomes[used], sample_weight=weights[used])
    model, slopes = float(estimator.intercept_[0]), np.asarray(estimator.coef_[0], dtype=np.float64)
    excess = counts * (predict(x, model, slopes) - y)
    gradient = np.array([excess.sum(), *(x.T @ excess + strength * slopes)]) / counts.sum()
    if np.abs(gradient).max() > 1e-4:
        raise FloatingPointError(f"the logistic regression did not converge (gradient {gradient.tolist()})")
    return model, slopes


def choose_strength(x: Array, y: Array, seed: int) -> float:
    """The ridge with the least log loss on prompts that were left out; the strongest of equals. FOLDS folds of the prompts."""
    lots = np.random.default_rng(seed).permutation(len(y)) % FOLDS
    losses = [
        sum(held_out_loss(x, y, lots == fold, strength) for fold in range(FOLDS)) for strength in STRENGTHS
    ]
    return STRENGTHS[int(np.argmin(np.round(losses, 9)))]


def held_out_loss(x: Array, y: Array, left_out: NDArray[np.bool_], strength: float) -> float:
    """Summed log loss, in nats, on the prompts left out of the fit."""
    kept = ~left_out
    p = predict(x[left_out], *fit(x[kept], y[kept], np.ones(int(kept.sum())), strength))
    # Where one side won all the kept prompts, p is 0 or 1.
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return float(-(y[left_out] * np.log(p) + (1 - y[left_out]) * np.log1p(-p)).sum())


def regression() -> Any:
    """scikit-learn's LogisticRegression, which only this figure needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError(
            "the length-controlled win rate needs scikit-learn: pip install scikit-learn (or metareward[assess])"
        ) from None
    return LogisticRegression
