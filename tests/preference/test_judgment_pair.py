"""Judge pairs: the rule by example, and the whole way from verdicts to pair against a second reading of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_expit

from metareward.preference.battle import Verdict, battle_matrix, position_weights
from metareward.preference.comparisons import comparison_orders
from metareward.preference.drops import DropReason
from metareward.preference.elo import elo_scores
from metareward.preference.judgment_pair import JudgePair, select_judgment_pair


def select(elo: list[float], ids: list[int] | None = None, **settings_: object) -> JudgePair | DropReason:
    arguments: dict[str, object] = {
        "elo": elo,
        "scores": [1.0, 2.0, 3.0, 4.0][: len(elo)],
        "lengths": [100] * len(elo),
        "decided": 2,
    }
    return select_judgment_pair(ids or list(range(len(elo))), **(arguments | settings_))  # type: ignore[arg-type]


def test_highest_against_lowest() -> None:
    assert select([0.5, -2.0, 1.5]) == JudgePair(2, 1, 1.5, -2.0, 3.0, 2.0)


def test_the_lowest_id_among_equals_not_the_first_in_the_list() -> None:
    pair = select([1.0, -1.0, 1.0 - 1e-9, -1.0 + 1e-9], ids=[9, 8, 2, 5])
    assert pair == JudgePair(2, 5, 1.0 - 1e-9, -1.0 + 1e-9, 3.0, 4.0)


def test_drops() -> None:
    assert select([1.0, -1.0], decided=0) is DropReason.NO_VERDICTS
    assert select([], decided=0) is DropReason.NO_VERDICTS
    assert select([0.0, 0.0, 0.0]) is DropReason.TIED
    assert select([0.0]) is DropReason.TIED
    assert select([4e-7, -4e-7]) is DropReason.TIED
    assert isinstance(select([6e-7, -6e-7]), JudgePair)


def test_only_a_chosen_judgment_over_the_limit_is_dropped() -> None:
    assert isinstance(select([1.0, -1.0], lengths=[1100, 5000], max_chosen_length=1100), JudgePair)
    assert select([1.0, -1.0], lengths=[1101, 5], max_chosen_length=1100) is DropReason.CHOSEN_TOO_LONG


def test_equal_scores_are_dropped_only_on_request() -> None:
    same = [3.0, 3.0]
    assert isinstance(select([1.0, -1.0], scores=same), JudgePair)
    assert select([1.0, -1.0], scores=same, drop_equal_scores=True) is DropReason.EQUAL_SCORES
    assert isinstance(select([1.0, -1.0], drop_equal_scores=True), JudgePair)


def test_bad_arguments() -> None:
    for wrong, said in [
        ({"lengths": [1]}, "same length"),
        ({"ids": [4, 4]}, "twice"),
        ({"scores": [1.0, math.nan]}, "finite"),
        ({"decided": -1}, "negative"),
        ({"max_chosen_length": -1}, "negative"),
    ]:
        with pytest.raises(ValueError, match=said):
            select([1.0, -1.0], **wrong)  # type: ignore[arg-type]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=4))
def test_a_judgment_is_never_both_picks(elo: list[float]) -> None:
    pair = select(elo)
    if isinstance(pair, JudgePair):
        assert pair.chosen != pair.rejected
        assert pair.chosen_elo > pair.rejected_elo
    else:
        assert max(elo) - min(elo) < 1e-6


IDS = [2, 5, 6, 9]
ORDERS = comparison_orders(IDS)


def second_reading(r: dict[tuple[int, int], int]) -> dict[int, float]:
    """Steps 3 to 5 of the paper from the table r, without matrices, and another optimiser."""
    first, second = sum(v == 1 for v in r.values()), sum(v == -1 for v in r.values())
    w1, w2 = (second / (first + second), first / (first + second)) if first + second else (0.5, 0.5)

    def loss(values: np.ndarray) -> float:
        eps = dict(zip(IDS, values, strict=True))
        total = 0.01 / 2 * sum(value**2 for value in values)
        for (m, n), outcome in r.items():
            if outcome == 1:
                total -= w1 * log_expit(eps[m] - eps[n])
            if outcome == -1:
                total -= w2 * log_expit(eps[n] - eps[m])
        return float(total)

    found = minimize(loss, np.zeros(len(IDS)), method="BFGS", options={"gtol": 1e-8})
    return dict(zip(IDS, found.x.tolist(), strict=True))


@settings(max_examples=40)
@given(st.lists(st.sampled_from([1, -1, 0]), min_size=len(ORDERS), max_size=len(ORDERS)), st.randoms())
def test_from_verdicts_to_pair(outcomes: list[int], order: object) -> None:
    r = dict(zip(ORDERS, outcomes, strict=True))
    verdicts = [Verdict(m, n, {1: "first", -1: "second", 0: None}[v]) for (m, n), v in r.items()]  # type: ignore[arg-type]
    order.shuffle(verdicts)  # type: ignore[attr-defined]
    elo = elo_scores(battle_matrix(IDS, verdicts, *position_weights(verdicts)))
    want = second_reading(r)
    np.testing.assert_allclose(elo, [want[judgment] for judgment in IDS], atol=1e-3)

    decided = sum(verdict.winner is not None for verdict in verdicts)
    pair = select_judgment_pair(IDS, elo=elo, scores=[0.0] * 4, lengths=[1] * 4, decided=decided)
    if isinstance(pair, JudgePair):
        assert want[pair.chosen] >= max(want.values()) - 1e-3
        assert want[pair.rejected] <= min(want.values()) + 1e-3
    elif pair is DropReason.NO_VERDICTS:
        assert decided == 0
    else:
        assert max(want.values()) - min(want.values()) < 1e-3


def test_swapping_every_winner_swaps_the_picks() -> None:
    winners = [
        "first",
        "second",
        "first",
        "first",
        None,
        "second",
        "first",
        "second",
        "first",
        None,
        "first",
        "first",
    ]
    other = {"first": "second", "second": "first", None: None}
    picks = []
    for flip in (False, True):
        verdicts = [
            Verdict(m, n, other[w] if flip else w)  # type: ignore[index, arg-type]
            for (m, n), w in zip(ORDERS, winners, strict=True)
        ]
        # equal weights: the position weights of the flipped verdicts are exchanged
        elo = elo_scores(battle_matrix(IDS, verdicts, 0.5, 0.5))
        picks.append(select_judgment_pair(IDS, elo=elo, scores=[0.0] * 4, lengths=[1] * 4, decided=10))
    assert isinstance(picks[0], JudgePair)
    assert isinstance(picks[1], JudgePair)
    assert (picks[0].chosen, picks[0].rejected) == (picks[1].rejected, picks[1].chosen)
