"""Caps on what the judge is trained on: options beyond the paper, against its collapse to one score.

The paper's judge drifts to the top of the scale (table 5). Two limits: on the share of any one score among
the chosen judgments, and on the share of judge pairs in a training set.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

# Keeps 0.29 * 100 = 28.999999999999996 a limit of 29.
_ROUNDING = 1e-9


def score_class(score: float) -> int:
    """The whole point nearest to a score, halves up: 4.5, 4.75, 4.9 and 5 are one class.

    Otherwise a judge that drifts to 4.9 would pass the cap by never writing 5.
    """
    return math.floor(score + 0.5)


def effective_share(chosen_scores: Sequence[float], max_share: float) -> float:
    """The share that `cap_score_class` can enforce: `max_share`, or 1/classes where classes are too few.

    With two classes one of them has half of any set, so a limit of 0.4 can mean only an even split. A caller
    reports it where the result is above `max_share`.
    """
    _check_share(max_share)
    classes = len({score_class(score) for score in chosen_scores})
    return max(max_share, 1 / classes) if classes else max_share


def cap_score_class(chosen_scores: Sequence[float], max_share: float, *, seed: int) -> list[int]:
    """Which judge pairs to keep so that no score class exceeds `max_share` of the pairs KEPT.

    Dropping makes the set smaller and the limit with it, so the size T of the result is the largest one that
    solves T = sum over classes of min(count, floor(share T)). The right side grows with T, so stepping down
    from the full size reaches the largest solution. Where the classes are too few for `max_share` the share
    is `effective_share`; then T is at least the number of classes, and a single class is kept whole: nothing
    balances it.

    Args:
        chosen_scores: the chosen judgment's score of every pair, in the order of the pairs' identities.
        max_share: in (0, 1].
        seed: decides which pairs of a class that is too large are kept.

    Returns:
        The kept indices, ascending; the same for the same arguments on every machine.

    Raises:
        ValueError: `max_share` out of range.
    """
    share = effective_share(chosen_scores, max_share)
    members: dict[int, list[int]] = {}
    for index, score in enumerate(chosen_scores):
        members.setdefault(score_class(score), []).append(index)
    limit = _largest_limit(Counter({name: len(indices) for name, indices in members.items()}), share)
    kept = [
        index
        for indices in members.values()
        for index in sorted(indices, key=lambda index: _lot(seed, index))[:limit]
    ]
    return sorted(kept)


def cap_judge_share(num_actor: int, num_judge: int, max_share: float) -> int:
    """How many judge pairs to keep so that they are at most `max_share` of actor and judge pairs together.

    Args:
        num_actor: actor pairs, all of which are kept.
        num_judge: judge pairs there are.
        max_share: in [0, 1]; 1 keeps all, 0 none.

    Raises:
        ValueError: a negative count, or `max_share` out of range.
    """
    if num_actor < 0 or num_judge < 0:
        raise ValueError(f"counts of pairs must not be negative, got {num_actor} and {num_judge}")
    if not 0.0 <= max_share <= 1.0:
        raise ValueError(f"max_share must be in [0, 1], not {max_share}")
    if max_share == 1.0:
        return num_judge
    # kept <= share (actor + kept)
    return min(num_judge, math.floor(max_share * num_actor / (1.0 - max_share) + _ROUNDING))


def _largest_limit(counts: Counter[int], share: float) -> int:
    total = counts.total()
    while True:
        limit = math.floor(share * total + _ROUNDING)
        kept = sum(min(count, limit) for count in counts.values())
        if kept == total:
            return limit
        total = kept


def _lot(seed: int, index: int) -> bytes:
    # A digest, not a generator: which pair is drawn does not depend on a library's version.
    return hashlib.sha256(f"{seed}:{index}".encode()).digest()


def _check_share(max_share: float) -> None:
    if not 0.0 < max_share <= 1.0:
        raise ValueError(f"max_share must be in (0, 1], not {max_share}")
