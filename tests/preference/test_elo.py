"""Elo scores: against a known answer, another optimiser, and the symmetries of the problem."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from metareward.preference.elo import elo_scores


@st.composite
def battle_matrices(draw: st.DrawFn, max_players: int = 11) -> np.ndarray:
    players = draw(st.integers(1, max_players))
    wins = st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0])
    battles = draw(arrays(np.float64, (players, players), elements=wins))
    np.fill_diagonal(battles, 0.0)
    return battles


def negative_objective(eps: np.ndarray, battles: np.ndarray, ridge: float) -> float:
    """The objective as the paper writes it, one term at a time."""
    total = -ridge / 2 * sum(e * e for e in eps)
    for m in range(len(eps)):
        for n in range(len(eps)):
            total += battles[m, n] * log_expit(eps[m] - eps[n])
    return -total


@settings(max_examples=25)
@given(battle_matrices(max_players=6), st.sampled_from([0.01, 0.1, 1.0]))
def test_agrees_with_another_optimiser(battles: np.ndarray, ridge: float) -> None:
    found = minimize(
        negative_objective,
        np.zeros(len(battles)),
        args=(battles, ridge),
        method="BFGS",
        options={"gtol": 1e-7},
    )
    np.testing.assert_allclose(elo_scores(battles, ridge), found.x, atol=2e-4)


@given(st.floats(-8, 8), st.floats(0.01, 5), st.floats(1e-3, 1))
def test_two_players_with_a_known_answer(gap: float, losses: float, ridge: float) -> None:
    # At the maximum wins sigmoid(-gap) = losses sigmoid(gap) + ridge gap / 2: solved for the wins.
    gap = abs(gap)
    wins = (losses * expit(gap) + ridge * gap / 2) / expit(-gap)
    scores = elo_scores(np.array([[0.0, wins], [losses, 0.0]]), ridge)
    np.testing.assert_allclose(scores, [gap / 2, -gap / 2], atol=1e-8)


def test_two_players_without_ridge_are_the_log_odds() -> None:
    scores = elo_scores(np.array([[0.0, 3.0], [1.0, 0.0]]), ridge=1e-9)
    assert scores[0] - scores[1] == pytest.approx(np.log(3.0), abs=1e-6)


@given(battle_matrices(), st.sampled_from([1e-6, 0.01, 1.0]))
def test_the_gradient_vanishes_and_the_scores_are_centred(battles: np.ndarray, ridge: float) -> None:
    scores = elo_scores(battles, ridge)
    for m in range(len(battles)):
        slope = -ridge * scores[m]
        for n in range(len(battles)):
            slope += battles[m, n] * expit(scores[n] - scores[m]) - battles[n, m] * expit(
                scores[m] - scores[n]
            )
        assert abs(slope) < 1e-10
    assert abs(scores.sum()) < 1e-9


@given(battle_matrices())
def test_swapping_winners_and_losers_negates_the_scores(battles: np.ndarray) -> None:
    np.testing.assert_allclose(elo_scores(battles.T), -elo_scores(battles), atol=1e-8)


@given(battle_matrices(), st.randoms())
def test_relabelling_permutes_the_scores(battles: np.ndarray, order: object) -> None:
    permutation = list(range(len(battles)))
    order.shuffle(permutation)  # type: ignore[attr-defined]
    permuted = elo_scores(battles[np.ix_(permutation, permutation)])
    np.testing.assert_allclose(permuted, elo_scores(battles)[permutation], atol=1e-8)


@given(battle_matrices(), st.data())
def test_one_win_more_never_lowers_the_winner(battles: np.ndarray, data: st.DataObject) -> None:
    if len(battles) < 2:
        return
    winner, loser = data.draw(st.permutations(range(len(battles))))[:2]
    more = battles.copy()
    more[winner, loser] += 1.0
    before, after = elo_scores(battles), elo_scores(more)
    assert after[winner] - after[loser] > before[winner] - before[loser]
    assert after[winner] > before[winner] - 1e-9


def test_one_that_never_loses_stays_finite() -> None:
    battles = np.triu(np.ones((11, 11)), k=1)
    for ridge in (1e-6, 0.01):
        scores = elo_scores(battles, ridge)
        assert np.isfinite(scores).all()
        assert (np.diff(scores) < 0).all()


def test_no_wins_and_no_players() -> None:
    assert elo_scores(np.zeros((4, 4))).tolist() == [0.0] * 4
    assert elo_scores(np.zeros((1, 1))).tolist() == [0.0]
    assert elo_scores(np.zeros((0, 0))).shape == (0,)


def test_a_judgment_that_was_never_compared_scores_zero() -> None:
    battles = np.zeros((3, 3))
    battles[0, 2] = 0.7
    scores = elo_scores(battles)
    assert scores[1] == pytest.approx(0.0, abs=1e-12)
    assert scores[0] > 1
    assert scores[2] < -1


@pytest.mark.parametrize(
    ("battles", "ridge", "said"),
    [
        (np.zeros((2, 3)), 0.01, "square"),
        (np.zeros(3), 0.01, "square"),
        (np.array([[0.0, -1.0], [0.0, 0.0]]), 0.01, "negative"),
        (np.array([[0.0, np.nan], [0.0, 0.0]]), 0.01, "finite"),
        (np.eye(2), 0.01, "diagonal"),
        (np.zeros((2, 2)), 0.0, "ridge"),
        (np.zeros((2, 2)), np.nan, "ridge"),
    ],
)
def test_bad_arguments(battles: np.ndarray, ridge: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        elo_scores(battles, ridge)
