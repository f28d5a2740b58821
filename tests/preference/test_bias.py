"""The bias figures of the report."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.preference.battle import Verdict
from metareward.preference.bias import (
    ScoredVerdict,
    higher_score_preference,
    position_preference,
    position_preference_at_equal_scores,
    position_preference_at_unequal_scores,
    score_entropy,
)

VERDICTS = [
    ScoredVerdict("first", 4.0, 3.0),  # the higher
    ScoredVerdict("second", 4.0, 3.0),  # the lower
    ScoredVerdict("second", 1.0, 3.0),  # the higher
    ScoredVerdict("second", 2.0, 2.5),  # the higher
    ScoredVerdict("first", 3.0, 3.0),
    ScoredVerdict("first", 3.0, 3.0),
    ScoredVerdict("second", 5.0, 5.0),
    ScoredVerdict(None, 5.0, 1.0),
    ScoredVerdict(None, 5.0, 5.0),
]


def test_figures_by_example() -> None:
    assert position_preference(VERDICTS) == pytest.approx(3 / 7)
    assert position_preference_at_equal_scores(VERDICTS) == pytest.approx(2 / 3)
    assert position_preference_at_unequal_scores(VERDICTS) == pytest.approx(1 / 4)
    assert higher_score_preference(VERDICTS) == pytest.approx(3 / 4)


def test_plain_verdicts_have_a_position_preference_too() -> None:
    assert position_preference([Verdict(0, 1, "first"), Verdict(1, 0, "second"), Verdict(0, 2, None)]) == 0.5


@pytest.mark.parametrize("verdicts", [[], [ScoredVerdict(None, 1.0, 2.0)]])
def test_nothing_decided_is_no_figure(verdicts: list[ScoredVerdict]) -> None:
    assert position_preference(verdicts) is None
    assert position_preference_at_equal_scores(verdicts) is None
    assert position_preference_at_unequal_scores(verdicts) is None
    assert higher_score_preference(verdicts) is None


SCORED = st.lists(
    st.builds(
        ScoredVerdict,
        st.sampled_from(["first", "second", None]),
        st.sampled_from([1.0, 2.0]),
        st.sampled_from([1.0, 2.0]),
    )
)


@given(SCORED)
def test_showing_every_pair_the_other_way_round(verdicts: list[ScoredVerdict]) -> None:
    other = {"first": "second", "second": "first", None: None}
    turned = [ScoredVerdict(other[v.winner], v.second_score, v.first_score) for v in verdicts]  # type: ignore[arg-type]
    assert higher_score_preference(turned) == higher_score_preference(verdicts)
    before, after = position_preference(verdicts), position_preference(turned)
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert before + after == pytest.approx(1)


@given(SCORED)
def test_the_whole_is_between_its_parts(verdicts: list[ScoredVerdict]) -> None:
    equal, unequal = (
        position_preference_at_equal_scores(verdicts),
        position_preference_at_unequal_scores(verdicts),
    )
    parts = [part for part in (equal, unequal) if part is not None]
    whole = position_preference(verdicts)
    assert (whole is None) == (not parts)
    if whole is not None:
        assert min(parts) - 1e-12 <= whole <= max(parts) + 1e-12


def test_entropy() -> None:
    assert score_entropy({}) is None
    assert score_entropy({5.0: 0}) is None
    assert score_entropy({5.0: 12}) == 0.0
    assert score_entropy({5.0: 12, 4.0: 0}) == 0.0
    assert score_entropy({float(point): 7 for point in range(6)}) == pytest.approx(math.log(6))
    assert score_entropy({5.0: 3, 4.5: 1}) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    with pytest.raises(ValueError, match="negative"):
        score_entropy({5.0: -1})
