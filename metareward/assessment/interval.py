"""Bootstrap intervals whose unit is the prompt.

Figures of one prompt hang together: its responses share a topic, and one response is part of several pairs. Drawing responses or
pairs one by one would call them independent and give intervals that are too narrow, so whole prompts are drawn, with everything
that belongs to them (the cluster bootstrap).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Indices = NDArray[np.int64]
# An interval from a distribution of which more than this share is undefined would describe the rest only.
MOST_UNDEFINED = 0.05


@dataclass(frozen=True)
class Interval:
    """Percentile interval: `low` and `high` hold `confidence` of the bootstrap distribution."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Estimate:
    """A figure of a sample of prompts. `value` is None where it is undefined, `interval` None where too few prompts define it."""

    value: float | None
    interval: Interval | None = None


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: `resamples` draws of as many prompts as there are, with replacement; 0: no intervals.

    Raises:
        ValueError: `resamples` is negative, or `confidence` is not between 0 and 1.
    """

    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 0 or not 0.0 < self.confidence < 1.0:
            raise ValueError(
                f"{self.resamples} resamples and a confidence of {self.confidence} make no interval"
            )


def members(prompt_ids: Sequence[str]) -> list[Indices]:
    """The rows of every prompt, prompts in the order of their first row."""
    rows: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(prompt_ids):
        rows.setdefault(prompt_id, []).append(row)
    return [np.array(group, dtype=np.int64) for group in rows.values()]


def estimate(
    statistic: Callable[[Indices], float | None], prompt_ids: Sequence[str], resampling: Resampling
) -> Estimate:
    """`statistic` of all rows, with its interval.

    Args:
        statistic: takes row numbers, in which a row that was drawn twice comes twice; None where it is undefined.
        prompt_ids: the prompt that each row belongs to.
        resampling: the same seed gives the same draws of prompts to every statistic.
    """
    groups = members(prompt_ids)
    value = statistic(np.arange(len(prompt_ids))) if groups else None
    if value is None or len(groups) < 2 or resampling.resamples == 0:
        return Estimate(value)

    def of_draw(draw: Indices) -> float:
        found = statistic(np.concatenate([groups[index] for index in draw]))
        return float("nan") if found is None else found

    return Estimate(value, percentile_interval(of_draw, len(groups), resampling))


def estimate_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    prompt_ids: Sequence[str],
    resampling: Resampling,
) -> Estimate:
    """Sum of the numerators over sum of the denominators, with its interval; one pass for all resamples, for shares and means."""
    groups = members(prompt_ids)
    above, below = (
        np.array([column[rows].sum() for rows in groups])
        for column in (np.asarray(values, dtype=np.float64) for values in (numerators, denominators))
    )
    if below.sum() <= 0:
        return Estimate(None)
    value = float(above.sum() / below.sum())
    # A prompt without a denominator says nothing either way, and is drawn all the same: that there are such is part of the doubt.
    if (below > 0).sum() < 2 or resampling.resamples == 0:
        return Estimate(value)

    def of_draw(draw: Indices) -> float:
        drawn = below[draw].sum()
        return float(above[draw].sum() / drawn) if drawn > 0 else float("nan")

    return Estimate(value, percentile_interval(of_draw, len(groups), resampling))


def percentile_interval(
    of_draw: Callable[[Indices], float], count: int, resampling: Resampling
) -> Interval | None:
    """Interval of `of_draw` over draws of `count` prompts by their numbers; NaN from it is "undefined".

    None where more than MOST_UNDEFINED of the draws are undefined.
    """
    with warnings.catch_warnings():
        # Undefined draws are counted below.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (np.arange(count),),
            of_draw,
            n_resamples=resampling.resamples,
            confidence_level=resampling.confidence,
            method="percentile",
            vectorized=False,
            rng=np.random.default_rng(resampling.seed),
        )
    drawn = np.asarray(result.bootstrap_distribution)
    defined = drawn[~np.isnan(drawn)]
    if len(defined) < (1 - MOST_UNDEFINED) * len(drawn):
        return None
    tail = (1 - resampling.confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(float(low), float(high), resampling.confidence)
