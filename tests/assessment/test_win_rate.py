"""Win rates from verdicts in both orders."""

from __future__ import annotations

import random
from typing import Literal

import pytest

from metareward.assessment.interval import Resampling
from metareward.assessment.win_rate import preference_of_orders, win_rate

Winner = Literal["first", "second"] | None


@pytest.mark.parametrize(
    ("shown_first", "shown_second", "preference"),
    [
        ("first", "second", 1.0),
        ("second", "first", 0.0),
        ("first", "first", 0.5),
        ("second", "second", 0.5),
        (None, "second", None),
        ("first", None, None),
        (None, None, None),
    ],
)
def test_both_orders(shown_first: Winner, shown_second: Winner, preference: float | None) -> None:
    assert preference_of_orders(shown_first, shown_second) == preference


def test_by_hand() -> None:
    found = win_rate(list("abcd"), [1.0, 0.5, None, 0.0], [10, 20, 99, 30], [1, 2, 99, 3], Resampling(200))
    assert (found.prompts, found.left_out, found.wins, found.ties, found.losses) == (3, 1, 1, 1, 1)
    assert (found.win_rate.value, found.length, found.baseline_length) == (0.5, 20.0, 2.0)
    assert win_rate(["a"], [None], [1], [1], Resampling(200)).win_rate.value is None
    with pytest.raises(ValueError, match=r"outside of \[0, 1\]"):
        win_rate(["a"], [1.5], [1], [1], Resampling(0))


def test_a_judge_that_always_takes_the_first_gives_one_half() -> None:
    """Position bias turns wins into ties; it moves the win rate to neither side."""
    rng = random.Random(0)
    for first in (0.0, 0.5, 1.0):
        preferences = []
        for _ in range(800):
            better = rng.random() < 0.7
            orders: list[Winner] = []
            for shown_first in (True, False):
                biased = rng.random() < 0.5
                wins_first = rng.random() < first if biased else better == shown_first
                orders.append("first" if wins_first else "second")
            preferences.append(preference_of_orders(*orders))
        found = win_rate(
            [str(i) for i in range(800)], preferences, [1] * 800, [1] * 800, Resampling(300, 0.999)
        )
        assert found.win_rate.interval is not None
        # Half the verdicts are by quality: 0.5 * 0.7 + 0.5 * 0.5.
        assert found.win_rate.interval.low < 0.6 < found.win_rate.interval.high, first
