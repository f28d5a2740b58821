"""Limits of the collapse guard, on made-up figures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from metareward.config import GuardSettings
from metareward.preference.collapse import Measured, breaches, position_bias

OFF = GuardSettings(
    max_higher_score_preference=1.0,
    max_position_preference=1.0,
    min_score_entropy=0.0,
    min_parse_rate=0.0,
    max_mean_drift=5.0,
    min_observations=1,
)


@pytest.mark.parametrize(
    ("name", "limit", "fine", "beyond"),
    [
        ("higher_score_preference", {"max_higher_score_preference": 0.9}, (0.0, 0.63, 0.9), (0.9001, 0.977)),
        ("position_preference", {"max_position_preference": 0.85}, (0.5, 0.85), (0.86, 1.0)),
        ("score_entropy", {"min_score_entropy": 0.5}, (0.5, math.log(6)), (0.0, 0.499)),
        ("parse_rate", {"min_parse_rate": 0.8}, (0.8, 1.0), (0.0, 0.79)),
        ("mean_drift", {"max_mean_drift": 0.5}, (0.0, 0.5, -0.5), (0.51, -0.51, -5.0)),
    ],
)
def test_a_limit_is_passed_beyond_it_and_not_at_it(
    name: str, limit: dict[str, float], fine: tuple[float, ...], beyond: tuple[float, ...]
) -> None:
    settings = replace(OFF, **limit)
    for value in fine:
        assert breaches([Measured(name, value, 1)], settings) == []
    for value in beyond:
        (found,) = breaches([Measured(name, value, 1)], settings)
        assert (found.name, found.value, f"{found.limit:g}") == (
            name,
            value,
            f"{next(iter(limit.values())):g}",
        )
        assert f"guard.{next(iter(limit))} = {found.limit:g}" in found.sentence()
        assert breaches([Measured(name, value, 1)], OFF) == []


def test_too_few_observations_or_none_pass() -> None:
    settings = replace(GuardSettings(), min_observations=50)
    assert breaches([Measured("parse_rate", 0.1, 49), Measured("score_entropy", None, 0)], settings) == []
    (found,) = breaches([Measured("parse_rate", 0.1, 50)], settings)
    assert found.sentence() == "only 10.0% of 50 judgments could be read (guard.min_parse_rate = 0.8)"


def test_the_paper_s_own_collapse_is_seen_by_the_defaults() -> None:
    """Table 5: 97.7 % for the higher score by iteration 2, a mean from 4.1 to above 4.7; 63 % and 68 % at the start."""
    start = [Measured("higher_score_preference", 0.63, 1000), Measured("position_preference", 0.68, 1000)]
    assert breaches(start, GuardSettings()) == []
    later = [Measured("mean_drift", 0.6, 1000), Measured("higher_score_preference", 0.977, 1000)]
    assert [item.name for item in breaches(later, GuardSettings())] == [
        "mean_drift",
        "higher_score_preference",
    ]


def test_either_position_is_a_bias() -> None:
    assert position_bias(0.2) == pytest.approx(0.8)
    assert position_bias(0.8) == pytest.approx(0.8)
    assert position_bias(0.5) == 0.5
    assert position_bias(None) is None


def test_a_figure_without_a_limit_is_a_defect() -> None:
    with pytest.raises(ValueError, match="no limit on happiness"):
        breaches([Measured("happiness", 1.0, 100)], GuardSettings())
