"""Position weights, the battle matrix, and the order-consistent verdicts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.preference.battle import Verdict, battle_matrix, consistent_only, position_weights
from metareward.preference.comparisons import comparison_orders

IDS = [3, 8, 11, 20]
ORDERS = comparison_orders(IDS)
# r as in the paper: +1 the first wins, -1 the second, 0 unreadable; None: the comparison is missing
OUTCOMES = st.lists(st.sampled_from([1, -1, 0, None]), min_size=len(ORDERS), max_size=len(ORDERS))
WINNER = {1: "first", -1: "second", 0: None}


def verdicts_of(outcomes: list[int | None]) -> list[Verdict]:
    return [
        Verdict(m, n, WINNER[r])  # type: ignore[arg-type]
        for (m, n), r in zip(ORDERS, outcomes, strict=True)
        if r is not None
    ]


def test_a_position_that_wins_more_counts_less() -> None:
    verdicts = [Verdict(0, 1, "first")] * 3 + [Verdict(0, 1, "second")] + [Verdict(0, 1, None)] * 5
    assert position_weights(verdicts) == (0.25, 0.75)
    assert position_weights([Verdict(0, 1, "first")]) == (0.0, 1.0)
    assert position_weights([Verdict(0, 1, "second")]) == (1.0, 0.0)
    assert position_weights([]) == (0.5, 0.5)
    assert position_weights([Verdict(0, 1, None)]) == (0.5, 0.5)


def test_matrix_by_example() -> None:
    verdicts = [Verdict(5, 9, "first"), Verdict(9, 5, "second"), Verdict(5, 2, "second"), Verdict(2, 5, None)]
    # 5 beats 9 shown first and shown second; 2 beats 5 shown second
    want = [[0, 0, 0.75], [0, 0, 0], [0, 1.0, 0]]
    assert battle_matrix([2, 9, 5], verdicts, 0.25, 0.75).tolist() == want


@given(OUTCOMES, st.floats(0, 1))
def test_matrix_is_the_papers_formula(outcomes: list[int | None], w1: float) -> None:
    w2 = 1 - w1
    r = {order: outcome for order, outcome in zip(ORDERS, outcomes, strict=True)}
    battles = battle_matrix(IDS, verdicts_of(outcomes), w1, w2)
    for i, m in enumerate(IDS):
        for j, n in enumerate(IDS):
            want = w1 * (r.get((m, n)) == 1) + w2 * (r.get((n, m)) == -1)
            assert battles[i, j] == pytest.approx(want)


@given(OUTCOMES, st.randoms())
def test_the_place_of_a_verdict_in_the_list_does_not_matter(
    outcomes: list[int | None], order: object
) -> None:
    verdicts = verdicts_of(outcomes)
    before = battle_matrix(IDS, verdicts, 0.3, 0.7)
    order.shuffle(verdicts)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(battle_matrix(IDS, verdicts, 0.3, 0.7), before)


@given(OUTCOMES, st.permutations(range(len(IDS))))
def test_relabelling_permutes_the_matrix(outcomes: list[int | None], permutation: list[int]) -> None:
    verdicts = verdicts_of(outcomes)
    ids = [IDS[place] for place in permutation]
    battles = battle_matrix(IDS, verdicts, 0.3, 0.7)
    np.testing.assert_array_equal(
        battle_matrix(ids, verdicts, 0.3, 0.7), battles[np.ix_(permutation, permutation)]
    )


@given(OUTCOMES)
def test_weights_give_both_positions_the_same_credit(outcomes: list[int | None]) -> None:
    verdicts = verdicts_of(outcomes)
    w1, w2 = position_weights(verdicts)
    winners = [verdict.winner for verdict in verdicts]
    assert w1 + w2 == pytest.approx(1)
    if any(winners):
        assert w1 * winners.count("first") == pytest.approx(w2 * winners.count("second"))


def test_consistent_verdicts_by_example() -> None:
    agreed = [Verdict(1, 2, "first"), Verdict(2, 1, "second")]
    position_only = [Verdict(1, 3, "first"), Verdict(3, 1, "first")]
    half = [Verdict(2, 3, "first"), Verdict(3, 2, None), Verdict(1, 4, "second")]
    unread = [Verdict(2, 4, None), Verdict(4, 2, None)]
    assert consistent_only(agreed + position_only + half + unread) == agreed


@given(OUTCOMES)
def test_consistent_verdicts_name_one_winner_a_pair(outcomes: list[int | None]) -> None:
    kept = consistent_only(verdicts_of(outcomes))
    r = {order: outcome for order, outcome in zip(ORDERS, outcomes, strict=True)}
    want = {(m, n) for m, n in ORDERS if r[m, n] in (1, -1) and r[n, m] == -r[m, n]}  # type: ignore[operator]
    assert {(verdict.first, verdict.second) for verdict in kept} == want
    assert position_weights(kept) == (0.5, 0.5)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="itself"):
        Verdict(1, 1, "first")
    with pytest.raises(ValueError, match="winner"):
        Verdict(1, 2, "A")  # type: ignore[arg-type]
    twice = [Verdict(1, 2, "first"), Verdict(1, 2, "second")]
    with pytest.raises(ValueError, match="occurs twice"):
        battle_matrix([1, 2], twice, 0.5, 0.5)
    with pytest.raises(ValueError, match="occurs twice"):
        consistent_only(twice)
    with pytest.raises(ValueError, match="not in ids"):
        battle_matrix([1, 2], [Verdict(1, 3, None)], 0.5, 0.5)
    with pytest.raises(ValueError, match="occurs twice"):
        battle_matrix([1, 1], [], 0.5, 0.5)
