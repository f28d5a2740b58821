"""The response whose judgments disagree most."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.preference.variance import most_varied


def test_largest_variance_wins() -> None:
    assert most_varied({0: [3, 3, 4], 1: [0, 5], 2: [1, 4, 1, 4]}, 0.9) == 1


def test_population_variance_not_the_sample_variance() -> None:
    # population: 1 against 1.1875; sample: 2 against 1.5833
    assert most_varied({0: [2.0, 4.0], 1: [1.5, 1.5, 4.0, 3.0]}, 0.0) == 1


def test_one_judgment_is_not_eligible() -> None:
    assert most_varied({}, 0.0) is None
    assert most_varied({3: [5], 4: []}, 0.0) is None
    assert most_varied({3: [5], 4: [2, 2]}, 0.0) == 4


def test_ties_are_drawn_in_number_order() -> None:
    # 0.5 wide pairs, equal in theory and a few bits apart in floating point
    scores = {7: [4.9, 4.4], 2: [0.5, 0.0], 5: [3.1, 2.6], 1: [3.0, 3.0]}
    assert [most_varied(scores, draw) for draw in (0.0, 0.33, 0.34, 0.66, 0.67, 0.999999999)] == [
        2,
        2,
        5,
        5,
        7,
        7,
    ]
    assert most_varied(scores, math.nextafter(1.0, 0.0)) == 7


def test_bad_arguments() -> None:
    for draw in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="draw"):
            most_varied({0: [1, 2]}, draw)
    with pytest.raises(ValueError, match="response 3"):
        most_varied({3: [1, math.nan]}, 0.0)


@given(
    st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 20), max_size=6), max_size=7),
    st.floats(0, 1, exclude_max=True),
)
def test_agrees_with_exact_arithmetic(quarters: dict[int, list[int]], draw: float) -> None:
    exact = {
        key: Fraction(sum(v * v for v in values), len(values)) - Fraction(sum(values), len(values)) ** 2
        for key, values in quarters.items()
        if len(values) > 1
    }
    tied = sorted(key for key in exact if exact[key] == max(exact.values()))
    want = tied[math.floor(draw * len(tied))] if tied else None
    assert most_varied({key: [v / 4 for v in values] for key, values in quarters.items()}, draw) == want
