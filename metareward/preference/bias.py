"""How biased the meta-judge is, and how narrow the judge: figures for the report of every iteration.

The paper's table 5 finds the meta-judge preferring the first position and, with each iteration more, the
higher score, and the judge's scores closing in on 5. Each figure is None where nothing was there to measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol


class HasWinner(Protocol):
    """A comparison with its outcome: `battle.Verdict` or `ScoredVerdict`."""

    @property
    def winner(self) -> Literal["first", "second"] | None: ...


@dataclass(frozen=True)
class ScoredVerdict:
    """A comparison's outcome with the scores that the two judgments gave the response."""

    winner: Literal["first", "second"] | None
    first_score: float
    second_score: float


def position_preference(verdicts: Iterable[HasWinner]) -> float | None:
    """Share of decided comparisons that the judgment shown first won; 1/2 is unbiased."""
    return _share(verdict.winner == "first" for verdict in verdicts if verdict.winner is not None)


def position_preference_at_equal_scores(verdicts: Iterable[ScoredVerdict]) -> float | None:
    """`position_preference` over the comparisons of judgments with equal scores."""
    return position_preference(verdict for verdict in verdicts if verdict.first_score == verdict.second_score)


def position_preference_at_unequal_scores(verdicts: Iterable[ScoredVerdict]) -> float | None:
    """`position_preference` over the comparisons of judgments with unequal scores."""
    return position_preference(verdict for verdict in verdicts if verdict.first_score != verdict.second_score)


def higher_score_preference(verdicts: Iterable[ScoredVerdict]) -> float | None:
    """Share of decided comparisons of unequal scores that the judgment with the higher score won."""
    return _share(
        (verdict.winner == "first") == (verdict.first_score > verdict.second_score)
        for verdict in verdicts
        if verdict.winner is not None and verdict.first_score != verdict.second_score
    )


def score_entropy(histogram: Mapping[float, int]) -> float | None:
    """Entropy, in nats, of scores counted by value; 0 where the judge gives one score to everything.

    Raises:
        ValueError: a negative count.
    """
    if any(count < 0 for count in histogram.values()):
        raise ValueError("a count of the histogram is negative")
    total = sum(histogram.values())
    if total == 0:
        return None
    shares = [count / total for count in histogram.values() if count]
    return sum(share * math.log(1 / share) for share in shares)


def _share(outcomes: Iterable[bool]) -> float | None:
    counted = list(outcomes)
    return sum(counted) / len(counted) if counted else None
