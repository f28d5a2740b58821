"""The list of comparisons."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.preference.comparisons import comparison_orders


def test_the_papers_number() -> None:
    assert len(comparison_orders(range(11))) == 110


@given(st.lists(st.integers(0, 50), max_size=11, unique=True))
def test_every_unordered_pair_in_both_orders_once(ids: list[int]) -> None:
    orders = comparison_orders(ids)
    assert len(set(orders)) == len(orders)
    assert {frozenset(order) for order in orders} == {frozenset(pair) for pair in combinations(ids, 2)}
    assert {(b, a) for a, b in orders} == set(orders)


@given(st.lists(st.integers(0, 50), max_size=11, unique=True))
def test_comparisons_with_one_first_judgment_are_neighbours(ids: list[int]) -> None:
    firsts = [first for first, _ in comparison_orders(ids)]
    assert firsts == sorted(firsts)


def test_equal_scores_can_be_skipped() -> None:
    scores = {4: 3.0, 7: 2.0, 9: 3.0}
    assert comparison_orders([9, 4, 7], skip_equal_scores=scores) == [(4, 7), (7, 4), (7, 9), (9, 7)]
    assert comparison_orders([9, 4], skip_equal_scores=scores) == []
    assert comparison_orders([9, 4]) == [(4, 9), (9, 4)]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="twice"):
        comparison_orders([1, 2, 1])
    with pytest.raises(ValueError, match=r"\[2\]"):
        comparison_orders([1, 2], skip_equal_scores={1: 3.0})
