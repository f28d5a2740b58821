"""Judge pairs: the best against the worst judgment of a response (arXiv 2407.19594, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metareward.preference.drops import DropReason

# `elo_scores` is exact to about 1e-10, and a single win moves a score by far more than 1e-6.
TIED_BELOW = 1e-6
# Judgments this close share the top or the bottom. Well under TIED_BELOW, so that nobody can share both.
SHARED_WITHIN = 1e-7


@dataclass(frozen=True)
class JudgePair:
    """The judgment ids of a preference pair, with their Elo scores and the scores they gave the response."""

    chosen: int
    rejected: int
    chosen_elo: float
    rejected_elo: float
    chosen_score: float
    rejected_score: float


def select_judgment_pair(
    ids: Sequence[int],
    *,
    elo: Sequence[float] | np.ndarray,
    scores: Sequence[float],
    lengths: Sequence[int],
    decided: int,
    max_chosen_length: int | None = None,
    drop_equal_scores: bool = False,
) -> JudgePair | DropReason:
    """The judgments with the highest and the lowest Elo score; the lowest id among equals.

    Args:
        ids: the n judgments of one response; the next three arguments follow their order.
        elo: [n] from `elo_scores`.
        scores: [n] the score each judgment gave.
        lengths: [n] characters of each judgment's text.
        decided: how many comparisons of these judgments have a winner.
        max_chosen_length: a pair whose chosen judgment is longer is dropped. None is no limit.
        drop_equal_scores: drop pairs whose two judgments gave the same score; off in the paper.

    Returns:
        The pair, or why there is none: NO_VERDICTS, TIED (the scores spread by less than 1e-6), EQUAL_SCORES
        or CHOSEN_TOO_LONG, the first that applies.

    Raises:
        ValueError: lists of different lengths, a repeated id, a score that is not finite, a negative limit.
    """
    if not len(ids) == len(elo) == len(scores) == len(lengths):
        raise ValueError("ids, elo, scores and lengths must have the same length")
    if len(set(ids)) != len(ids):
        raise ValueError("a judgment id occurs twice")
    if not np.isfinite(elo).all() or not np.isfinite(scores).all():
        raise ValueError("an Elo score or a score is not finite")
    if decided < 0 or (max_chosen_length is not None and max_chosen_length < 0):
        raise ValueError(f"decided {decided} or max_chosen_length {max_chosen_length} is negative")
    if decided == 0 or len(ids) == 0:
        return DropReason.NO_VERDICTS

    top, bottom = float(max(elo)), float(min(elo))
    if top - bottom < TIED_BELOW:
        return DropReason.TIED
    everyone = range(len(ids))
    chosen = min((i for i in everyone if elo[i] >= top - SHARED_WITHIN), key=lambda i: ids[i])
    rejected = min((i for i in everyone if elo[i] <= bottom + SHARED_WITHIN), key=lambda i: ids[i])
    if drop_equal_scores and scores[chosen] == scores[rejected]:
        return DropReason.EQUAL_SCORES
    if max_chosen_length is not None and lengths[chosen] > max_chosen_length:
        return DropReason.CHOSEN_TOO_LONG
    return JudgePair(
        ids[chosen], ids[rejected], float(elo[chosen]), float(elo[rejected]), scores[chosen], scores[rejected]
    )
