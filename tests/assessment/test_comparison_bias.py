"""Meta-judge biases on made-up judges of known bias, and against the figures of a run."""

from __future__ import annotations

import random
from typing import Literal

import pytest

from metareward.assessment.comparison_bias import Comparison, ComparisonBias, comparison_bias
from metareward.assessment.interval import Estimate, Resampling
from metareward.preference import bias
from metareward.preference.bias import ScoredVerdict

Winner = Literal["first", "second"] | None


def made_up(
    prompts: int, first: float, higher: float, unreadable: float = 0.0, seed: int = 0
) -> list[Comparison]:
    """A judge that goes by unequal scores with probability `higher`, and else takes the first with probability `first`."""
    rng = random.Random(seed)
    found = []
    for prompt in range(prompts):
        for pair in range(4):
            scores = (3.0, 3.0) if pair % 2 else (2.0, 4.0)
            for turned in (False, True):
                one, two = scores[::-1] if turned else scores
                winner: Winner
                if rng.random() < unreadable:
                    winner = None
                elif one != two and rng.random() < higher:
                    winner = "first" if one > two else "second"
                else:
                    winner = "first" if rng.random() < first else "second"
                found.append(Comparison(f"p{prompt}", str(pair), ScoredVerdict(winner, one, two), turned))
    return found


def holds(figure: Estimate, truth: float) -> bool:
    assert figure.interval is not None
    return figure.interval.low <= truth <= figure.interval.high


def figures(comparisons: list[Comparison]) -> ComparisonBias:
    # 99.9 %: a true value is outside of one of these intervals once in a thousand seeds, and the seed is fixed.
    return comparison_bias(comparisons, Resampling(1000, 0.999))


def test_judges_of_known_bias() -> None:
    found = figures(made_up(400, first=0.7, higher=0.6))
    # Where scores differ: 0.6 by score, in half of which the higher one comes first; 0.4 by position.
    assert holds(found.position_unequal, 0.6 * 0.5 + 0.4 * 0.7)
    assert holds(found.position_equal, 0.7)
    assert holds(found.position, (0.7 + 0.58) / 2)
    assert holds(found.higher_score, 0.6 + 0.4 * 0.5)
    fair = figures(made_up(400, first=0.5, higher=0.0))
    assert holds(fair.position, 0.5)
    assert holds(fair.higher_score, 0.5)
    assert holds(fair.consistent, 0.5)
    for figure in (found.position_equal, found.higher_score):
        assert not holds(figure, 0.5)


def test_extremes() -> None:
    always_first = figures(made_up(20, first=1.0, higher=0.0))
    assert (always_first.position.value, always_first.consistent.value) == (1.0, 0.0)
    assert always_first.higher_score.value == 0.5
    by_score = figures([item for item in made_up(20, first=1.0, higher=1.0) if item.pair in "02"])
    assert (by_score.higher_score.value, by_score.consistent.value, by_score.position.value) == (
        1.0,
        1.0,
        0.5,
    )
    assert (by_score.equal_scores, by_score.position_equal.value) == (0, None)
    silent = figures(made_up(20, first=1.0, higher=1.0, unreadable=1.0))
    assert (silent.readable.value, silent.position.value, silent.consistent.value) == (0.0, None, None)
    assert figures([]).readable.value is None


def test_the_same_figures_as_a_run_s() -> None:
    comparisons = made_up(30, first=0.8, higher=0.3, unreadable=0.2, seed=3)
    verdicts = [item.verdict for item in comparisons]
    found = figures(comparisons)
    assert found.readable.value == pytest.approx(sum(item.winner is not None for item in verdicts) / 240)
    assert found.position.value == pytest.approx(bias.position_preference(verdicts))
    assert found.position_equal.value == pytest.approx(bias.position_preference_at_equal_scores(verdicts))
    assert found.position_unequal.value == pytest.approx(bias.position_preference_at_unequal_scores(verdicts))
    assert found.higher_score.value == pytest.approx(bias.higher_score_preference(verdicts))


def test_a_pair_read_in_one_order_says_nothing_of_consistency() -> None:
    one = Comparison("p", "0/1", ScoredVerdict("first", 1.0, 2.0), False)
    assert comparison_bias([one], Resampling(0)).consistent.value is None
    agreeing = Comparison("p", "0/1", ScoredVerdict("second", 2.0, 1.0), True)
    assert comparison_bias([one, agreeing], Resampling(0)).consistent.value == 1.0
    # The same pair number of another prompt is another pair.
    other = Comparison("q", "0/1", ScoredVerdict("first", 2.0, 1.0), True)
    assert comparison_bias([one, other], Resampling(0)).consistent.value is None
