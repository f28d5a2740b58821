"""Sampling parameters refuse what has no meaning."""

from __future__ import annotations

import math

import pytest

from metareward.errors import UserError
from metareward.sampler.request import EngineStats, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("max_new_tokens", 0),
    ],
)
def test_meaningless_parameter_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_limits_that_switch_a_rule_off_are_accepted() -> None:
    params = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=1)
    assert params.temperature == 0.0


def test_stats_sum_and_reset() -> None:
    stats = EngineStats(
        new_tokens=3, prefill_seconds=1.0, decode_seconds=2.0, sampling_seconds=3.0, host_seconds=4.0
    )
    assert stats.seconds == 10.0
    stats.reset()
    assert stats == EngineStats()
