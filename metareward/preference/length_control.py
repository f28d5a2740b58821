"""Actor pairs with length control (arXiv 2407.19594, section 2.1).

The judge likes length. So among the responses whose score is close to the best, the shortest is chosen, and
among those close to the worst, the longest is rejected. `rho` says how much of the score range counts as
close.

Scores are means of judgments. Two means of the same judgments differ in their last bits when they were summed
in another order, so scores within `TOLERANCE` are made equal before anything is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metareward.preference.drops import DropReason

# Means of at most a few thousand scores with two decimals differ by far more than this, rounding by far less.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Scored:
    """A response of a prompt: its number, its reward (mean score), its length in characters."""

    response_id: int
    score: float
    length: int


@dataclass(frozen=True)
class ActorPair:
    """The response numbers of a preference pair, with their scores."""

    chosen: int
    rejected: int
    chosen_score: float
    rejected_score: float


def select_actor_pair(
    candidates: Sequence[Scored], rho: float, max_chosen_length: int | None = None
) -> ActorPair | DropReason:
    """The preference pair of one prompt.

    With S_max and S_min the best and the worst score:
    chosen is the shortest response with score in [(1 - rho) S_max + rho S_min, S_max],
    rejected is the longest one with score in [S_min, (1 - rho) S_min + rho S_max].
    Equal lengths go to the better (chosen) or worse (rejected) score, then to the lower response number.

    Args:
        candidates: the responses that have a score, in any order.
        rho: in [0, 1); 0 is best against worst.
        max_chosen_length: characters; a pair whose chosen response is longer is dropped. None is no limit.

    Returns:
        The pair, or why there is none: TOO_FEW_SCORED, EQUAL_SCORES, SAME_RESPONSE, NOT_BETTER or
        CHOSEN_TOO_LONG, the first that applies. From rho = 1/2 up the two intervals meet; a pair that would
        then prefer the lower or an equal score is NOT_BETTER.

    Raises:
        ValueError: `rho` out of range, a score that is not finite, a negative length or limit, or a
            response number that occurs twice.
    """
    _check(candidates, rho, max_chosen_length)
    if len(candidates) < 2:
        return DropReason.TOO_FEW_SCORED
    scores = _merge_rounding([candidate.score for candidate in candidates])
    best, worst = max(scores), min(scores)
    if best == worst:
        return DropReason.EQUAL_SCORES

    margin = rho * (best - worst) + TOLERANCE
    pool = list(zip(scores, candidates, strict=True))
    chosen_score, chosen = min(
        (entry for entry in pool if entry[0] >= best - margin),
        key=lambda entry: (entry[1].length, -entry[0], entry[1].response_id),
    )
    rejected_score, rejected = min(
        (entry for entry in pool if entry[0] <= worst + margin),
        key=lambda entry: (-entry[1].length, entry[0], entry[1].response_id),
    )
    if chosen.response_id == rejected.response_id:
        return DropReason.SAME_RESPONSE
    if chosen_score <= rejected_score:
        return DropReason.NOT_BETTER
    if max_chosen_length is not None and chosen.length > max_chosen_length:
        return DropReason.CHOSEN_TOO_LONG
    return ActorPair(chosen.response_id, rejected.response_id, chosen.score, rejected.score)


def _merge_rounding(scores: Sequence[float]) -> list[float]:
    """Give scores that differ only by rounding the largest of their values."""
    merged: dict[float, float] = {}
    head = math.inf
    for score in sorted(scores, reverse=True):
        if head - score > TOLERANCE:
            head = score
        merged[score] = head
    return [merged[score] for score in scores]


def _check(candidates: Sequence[Scored], rho: float, max_chosen_length: int | None) -> None:
    if not 0.0 <= rho < 1.0:
        raise ValueError(f"rho must be in [0, 1), not {rho}")
    if max_chosen_length is not None and max_chosen_length < 0:
        raise ValueError(f"max_chosen_length must not be negative, got {max_chosen_length}")
    if len({candidate.response_id for candidate in candidates}) != len(candidates):
        raise ValueError("a response_id occurs twice among the candidates")
    for candidate in candidates:
        if not math.isfinite(candidate.score) or candidate.length < 0:
            raise ValueError(f"a candidate needs a finite score and a length of 0 or more, got {candidate}")
