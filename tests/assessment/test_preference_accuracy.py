"""Accuracy on pairwise preferences: ties counted half and apart, unscored pairs left out."""

from __future__ import annotations

import random

import pytest

from metareward.assessment.interval import Resampling
from metareward.assessment.preference_accuracy import preference_accuracy


def test_by_hand() -> None:
    found = preference_accuracy(
        list("abcde"), [3.0, 2.0, 4.0, None, 1.0], [1.0, 2.0, 4.5, 1.0, None], Resampling(200)
    )
    assert (found.pairs, found.scored) == (5, 3)
    assert found.accuracy.value == pytest.approx(0.5)
    assert found.tied.value == pytest.approx(1 / 3)
    assert found.accuracy_untied.value == pytest.approx(0.5)


def test_nothing_to_go_by() -> None:
    for chosen, rejected in (([], []), ([None], [1.0])):
        found = preference_accuracy(["p"] * len(chosen), chosen, rejected, Resampling(200))
        assert (found.scored, found.accuracy.value, found.tied.value) == (0, None, None)
    tied = preference_accuracy(["p", "q"], [2.0, 2.0], [2.0, 2.0], Resampling(200))
    assert (tied.accuracy.value, tied.tied.value, tied.accuracy_untied.value) == (0.5, 1.0, None)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        preference_accuracy(["p"], [1.0, 2.0], [1.0], Resampling(0))


def test_a_judge_of_known_accuracy() -> None:
    rng = random.Random(0)
    right = [rng.random() < 0.8 for _ in range(600)]
    found = preference_accuracy(
        [str(index // 2) for index in range(600)],
        [4.0 if item else 1.0 for item in right],
        [2.0] * 600,
        Resampling(1000, 0.999),
    )
    assert found.accuracy.interval is not None
    assert found.accuracy.interval.low < 0.8 < found.accuracy.interval.high
    assert found.accuracy.interval.low > 0.5
