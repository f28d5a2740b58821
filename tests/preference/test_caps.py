"""The caps on judge pairs: the limit holds for what is kept, and nothing is dropped without need."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.preference.caps import cap_judge_share, cap_score_class, effective_share, score_class

SHARES = st.sampled_from(["0.25", "0.29", "0.4", "0.5", "0.7", "1"])


def classes(scores: list[float], kept: list[int]) -> Counter[int]:
    return Counter(score_class(scores[index]) for index in kept)


def test_the_share_is_that_of_the_pairs_kept() -> None:
    scores = [5.0] * 60 + [4.0] * 20 + [3.0] * 20
    kept = cap_score_class(scores, 0.4, seed=0)
    # 40 of 100 would be 40 of 80 after dropping: the fixed point is 26 of 66
    assert classes(scores, kept) == {5: 26, 4: 20, 3: 20}
    assert kept == sorted(set(kept))


def test_a_set_within_the_limit_stays_whole() -> None:
    scores = [5.0, 4.0, 3.0] * 10
    assert cap_score_class(scores, 0.4, seed=0) == list(range(30))
    assert cap_score_class(scores, 1.0, seed=0) == list(range(30))
    assert cap_score_class([], 0.4, seed=0) == []


def test_a_limit_that_rounding_puts_just_below_a_whole_number() -> None:
    assert 0.29 * 100 < 29
    scores = [5.0] * 29 + [4.0] * 29 + [3.0] * 29 + [2.0] * 13
    assert len(cap_score_class(scores, 0.29, seed=0)) == 100
    assert 0.6 * 2 / (1 - 0.6) < 3
    assert cap_judge_share(2, 99, 0.6) == 3


def test_fractions_count_with_the_nearest_point() -> None:
    assert [score_class(score) for score in (0.0, 0.49, 0.5, 4.4, 4.5, 4.75, 4.9, 5.0)] == [
        0,
        0,
        1,
        4,
        5,
        5,
        5,
        5,
    ]
    scores = [5.0, 4.9, 4.75, 4.5] * 10 + [3.0] * 10 + [2.0] * 10
    assert classes(scores, cap_score_class(scores, 0.4, seed=0))[5] == 13


def test_too_few_classes_are_split_evenly() -> None:
    scores = [5.0] * 90 + [4.0] * 10
    assert effective_share(scores, 0.4) == 0.5
    assert classes(scores, cap_score_class(scores, 0.4, seed=0)) == {5: 10, 4: 10}
    assert cap_score_class([5.0, 5.0, 5.0], 0.4, seed=0) == [0, 1, 2]
    assert effective_share([5.0, 5.0], 0.4) == 1.0
    assert effective_share([], 0.4) == effective_share([5.0, 4.0, 3.0], 0.4) == 0.4


def test_the_seed_decides_who_stays_and_nothing_else() -> None:
    scores = [5.0] * 40 + [4.0] * 10 + [3.0] * 10
    one, again, other = (cap_score_class(scores, 0.4, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert classes(scores, one) == classes(scores, other)
    # not simply the first of the file
    assert one[:13] != list(range(13))


@given(st.lists(st.integers(0, 5), max_size=40), SHARES, st.integers(0, 3))
def test_the_limit_holds_and_every_class_survives(points: list[int], share: str, seed: int) -> None:
    scores = [float(point) for point in points]
    kept = cap_score_class(scores, float(share), seed=seed)
    limit = max(Fraction(share), Fraction(1, len(set(points)))) if points else Fraction(1)
    counts = classes(scores, kept)
    assert all(count <= limit * len(kept) for count in counts.values())
    assert set(counts) == set(points)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), SHARES)
def test_no_larger_set_keeps_the_limit(counts: list[int], share: str) -> None:
    scores = [float(point) for point, count in enumerate(counts) for _ in range(count)]
    present = sum(count > 0 for count in counts)
    limit = max(Fraction(share), Fraction(1, present)) if present else Fraction(1)
    largest = max(
        sum(trial)
        for trial in product(*(range(count + 1) for count in counts))
        if all(kept <= limit * sum(trial) for kept in trial)
    )
    assert len(cap_score_class(scores, float(share), seed=0)) == largest


@given(
    st.integers(0, 60), st.integers(0, 60), st.sampled_from(["0", "0.1", "0.15", "0.29", "0.5", "0.9", "1"])
)
def test_judge_share_by_counting(num_actor: int, num_judge: int, share: str) -> None:
    limit = Fraction(share)
    want = max(kept for kept in range(num_judge + 1) if kept <= limit * (num_actor + kept))
    assert cap_judge_share(num_actor, num_judge, float(share)) == want


def test_judge_share_by_example() -> None:
    assert cap_judge_share(85, 100, 0.15) == 15
    assert cap_judge_share(85, 10, 0.15) == 10
    assert cap_judge_share(0, 10, 0.5) == 0
    assert cap_judge_share(0, 10, 1.0) == 10


def test_bad_arguments() -> None:
    for share in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="max_share"):
            cap_score_class([1.0], share, seed=0)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="max_share"):
            cap_judge_share(1, 1, share)
    with pytest.raises(ValueError, match="negative"):
        cap_judge_share(-1, 1, 0.5)
