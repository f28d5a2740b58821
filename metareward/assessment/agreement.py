"""Agreement of scores with people's labels: rank correlations, who is preferred within a prompt, exact classes. Numbers in and out.

The paper reports Spearman's correlation of the judge with people (section 3.3). All intervals draw whole prompts, see `interval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from metareward.assessment.interval import Estimate, Indices, Resampling, estimate, estimate_ratio, members
from metareward.preference.caps import score_class
from metareward.roles.seed_judgment import score_of_quality

NO_INTERVALS = Resampling(resamples=0)


@dataclass(frozen=True)
class Agreement:
    """Over all scored responses: `spearman`, `kendall` (tau-b, which corrects for ties) and `exact`, the share whose score class is
    the label's (0..5, the nearest whole point). Correlations are None where a side is constant or fewer than 3 are scored.

    Among the `pairs` of responses to one prompt whose labels differ: `pairwise`, the share that the scores order as people do, a
    tie in the scores counting half; `tied`, the share of ties; `pairwise_untied`, the share among the others.
    """

    scored: int
    spearman: Estimate
    kendall: Estimate
    pairs: int
    pairwise: Estimate
    pairwise_untied: Estimate
    tied: Estimate
    exact: Estimate


def agreement(
    prompt_ids: Sequence[str],
    labels: Sequence[float],
    scores: Sequence[float | None],
    resampling: Resampling = NO_INTERVALS,
) -> Agreement:
    """Agreement of `scores` (0..5) with `labels` (0..1), response by response; one without a score (None) is left out.

    Raises:
        ValueError: the three differ in length.
    """
    known = [row for row in zip(prompt_ids, labels, scores, strict=True) if row[2] is not None]
    ids = [row[0] for row in known]
    label = np.array([row[1] for row in known], dtype=np.float64)
    score = np.array([row[2] for row in known], dtype=np.float64)
    pair_ids, ordered = ordered_pairs(ids, label, score)
    tied = ordered == 0
    one = np.ones(len(ordered))
    exact = [
        float(score_class(own) == score_of_quality(people)) for own, people in zip(score, label, strict=True)
    ]
    return Agreement(
        scored=len(known),
        spearman=estimate(lambda rows: spearman(label[rows], score[rows]), ids, resampling),
        kendall=estimate(lambda rows: kendall(label[rows], score[rows]), ids, resampling),
        pairs=len(ordered),
        pairwise=estimate_ratio((ordered + 1) / 2, one, pair_ids, resampling),
        pairwise_untied=estimate_ratio((ordered > 0) * 1.0, ~tied * 1.0, pair_ids, resampling),
        tied=estimate_ratio(tied * 1.0, one, pair_ids, resampling),
        exact=estimate_ratio(exact, np.ones(len(exact)), ids, resampling),
    )


def ordered_pairs(
    prompt_ids: Sequence[str], labels: NDArray[np.float64], scores: NDArray[np.float64]
) -> tuple[list[str], NDArray[np.float64]]:
    """Every pair of one prompt's rows whose labels differ: its prompt, and 1 where the scores order it as the labels do, -1 where
    the other way, 0 where they are equal."""
    ids: list[str] = []
    order: list[float] = []
    for rows in members(prompt_ids):
        for i, j in combinations(rows, 2):
            if labels[i] != labels[j]:
                ids.append(prompt_ids[i])
                order.append(float(np.sign(labels[i] - labels[j]) * np.sign(scores[i] - scores[j])))
    return ids, np.array(order, dtype=np.float64)


def varied(*columns: NDArray[np.float64]) -> bool:
    """Whether a correlation is defined: 3 rows or more, and no constant column."""
    return all(len(column) >= 3 and bool((column != column[0]).any()) for column in columns)


def spearman(one: NDArray[np.float64], two: NDArray[np.float64]) -> float | None:
    """Spearman's rank correlation, None where `varied` says no."""
    return float(stats.spearmanr(one, two).statistic) if varied(one, two) else None


def kendall(one: NDArray[np.float64], two: NDArray[np.float64]) -> float | None:
    """Kendall's tau-b, None where `varied` says no."""
    return float(stats.kendalltau(one, two, variant="b").statistic) if varied(one, two) else None


@dataclass(frozen=True)
class LengthDependence:
    """Rank correlations that tell whether a judge goes by more than length; None where one side is constant.

    `label`: of length with people's labels. `score`: of length with the judge's scores. `partial`: of scores with labels once
    the ranks of length are taken out of both (the partial Spearman correlation); 0 for a judge that only measures length.
    """

    label: Estimate
    score: Estimate
    partial: Estimate


def length_dependence(
    prompt_ids: Sequence[str],
    lengths: Sequence[int],
    labels: Sequence[float],
    scores: Sequence[float | None],
    resampling: Resampling = NO_INTERVALS,
) -> LengthDependence:
    """How far `scores` follow the length of the response, in characters; responses without a score are left out.

    Raises:
        ValueError: the lists differ in length.
    """
    known = [row for row in zip(prompt_ids, lengths, labels, scores, strict=True) if row[3] is not None]
    ids = [row[0] for row in known]
    length, label, score = (
        np.array([row[column] for row in known], dtype=np.float64) for column in (1, 2, 3)
    )
    if len(known) < 4 or not varied(length, label, score):
        return LengthDependence(Estimate(None), Estimate(None), Estimate(None))

    def partial(rows: Indices) -> float | None:
        return partial_spearman(label[rows], score[rows], length[rows])

    return LengthDependence(
        estimate(lambda rows: spearman(length[rows], label[rows]), ids, resampling),
        estimate(lambda rows: spearman(length[rows], score[rows]), ids, resampling),
        estimate(partial, ids, resampling),
    )


def partial_spearman(
    one: NDArray[np.float64], two: NDArray[np.float64], given: NDArray[np.float64]
) -> float | None:
    """Spearman's correlation of `one` and `two` with the ranks of `given` taken out of both; None where `given` fixes either."""
    if not varied(one, two, given):
        return None
    table = np.corrcoef([stats.rankdata(column) for column in (given, one, two)])
    rest = (1 - table[0, 1] ** 2) * (1 - table[0, 2] ** 2)
    return float((table[1, 2] - table[0, 1] * table[0, 2]) / rest**0.5) if rest > 1e-12 else None
