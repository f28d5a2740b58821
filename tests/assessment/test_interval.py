"""Bootstrap intervals against scipy's own, against theory, and on prompts whose rows hang together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from metareward.assessment.interval import Interval, Resampling, estimate, estimate_ratio, members

MANY = Resampling(1000)


def mean_of(values: np.ndarray):
    return lambda rows: float(values[rows].mean())


def test_one_row_a_prompt_is_the_ordinary_bootstrap() -> None:
    values = np.random.default_rng(1).normal(size=60)
    found = estimate(mean_of(values), [str(index) for index in range(60)], MANY)
    own = stats.bootstrap(
        (values,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(5)
    )
    assert found.value == pytest.approx(values.mean())
    error = values.std() / 60**0.5
    assert found.interval is not None
    assert found.interval.low == pytest.approx(own.confidence_interval.low, abs=0.2 * error)
    assert found.interval.high == pytest.approx(own.confidence_interval.high, abs=0.2 * error)
    assert found.interval.high - found.interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_rows_of_one_prompt_are_no_independent_evidence() -> None:
    """Ten copies of every row change nothing; drawn row by row they would give intervals sqrt(10) times narrower."""
    values = np.random.default_rng(2).normal(size=40)
    ids = [str(index) for index in range(40)]
    once = estimate(mean_of(values), ids, MANY)
    copied = estimate(mean_of(np.repeat(values, 10)), [name for name in ids for _ in range(10)], MANY)
    assert copied.value == pytest.approx(once.value)
    assert copied.interval is not None
    assert once.interval is not None
    assert copied.interval.low == pytest.approx(once.interval.low)
    assert copied.interval.high == pytest.approx(once.interval.high)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    held = 0
    for trial in range(150):
        effect = rng.normal(size=40)
        rows = np.repeat(effect, 4) + rng.normal(size=160)
        ids = [str(index // 4) for index in range(160)]
        found = estimate_ratio(rows, np.ones(160), ids, Resampling(150, 0.9, seed=trial))
        assert found.interval is not None
        held += found.interval.low <= 0.0 <= found.interval.high
    # Binomial(150, 0.9) / 150 is within 0.9 +- 0.1 but for one time in 20,000; the bootstrap is a little narrow at 40 prompts.
    assert 0.78 <= held / 150 <= 0.97


def test_ratio_and_statistic_are_the_same_figure() -> None:
    rng = np.random.default_rng(4)
    ids = [f"p{index}" for index in rng.integers(0, 20, 90)]
    above, below = rng.random(90), rng.integers(0, 2, 90).astype(float)
    one = estimate_ratio(above, below, ids, MANY)
    two = estimate(lambda rows: float(above[rows].sum() / below[rows].sum()), ids, MANY)
    assert one.value == pytest.approx(two.value)
    assert one.interval == Interval(pytest.approx(two.interval.low), pytest.approx(two.interval.high), 0.95)  # type: ignore[union-attr, arg-type]


def test_where_there_is_no_interval() -> None:
    assert estimate(lambda rows: 1.0, [], MANY).value is None
    assert estimate(lambda rows: None, ["a", "b"], MANY) == estimate_ratio([], [], [], MANY)
    assert estimate(lambda rows: 1.0, ["a", "a"], MANY).interval is None
    assert estimate(lambda rows: 1.0, ["a", "b"], Resampling(0)).interval is None
    # Defined by one prompt of two only: a quarter of the draws lack it.
    assert estimate_ratio([1.0, 0.0], [1.0, 0.0], ["a", "b"], MANY).interval is None
    half = estimate(lambda rows: 1.0 if 0 in rows else None, ["a", "b"], MANY)
    assert (half.value, half.interval) == (1.0, None)
    for arguments in ((-1, 0.9), (10, 1.0), (10, 0.0)):
        with pytest.raises(ValueError, match="make no interval"):
            Resampling(*arguments)


def test_members_follow_the_first_row() -> None:
    assert [rows.tolist() for rows in members(["b", "a", "b"])] == [[0, 2], [1]]
