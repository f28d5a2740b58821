"""Agreement of scores with people's labels: rank correlation, and who is preferred within a prompt. Numbers in, numbers out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from scipy import stats


@dataclass(frozen=True)
class Agreement:
    """`spearman`: over all responses, None where a side is constant or fewer than 3 are scored. `pairwise`: among pairs of
    responses to one prompt whose labels differ, the share that the scores order as people do; a tie in the scores counts
    half. `pairs`: how many such pairs there are."""

    scored: int
    spearman: float | None
    pairwise: float | None
    pairs: int


def agreement(
    prompt_ids: Sequence[str], labels: Sequence[float], scores: Sequence[float | None]
) -> Agreement:
    """Agreement of `scores` with `labels`, response by response; a response without a score (None) is left out."""
    known = [
        (prompt_id, label, score)
        for prompt_id, label, score in zip(prompt_ids, labels, scores, strict=True)
        if score is not None
    ]
    spearman = None
    if (
        len(known) >= 3
        and len({label for _, label, _ in known}) > 1
        and len({score for _, _, score in known}) > 1
    ):
        spearman = float(
            stats.spearmanr([label for _, label, _ in known], [score for _, _, score in known]).statistic
        )
    by_prompt: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for prompt_id, label, score in known:
        by_prompt[prompt_id].append((label, score))
    credits = [
        0.5 if one[1] == two[1] else float((one[0] > two[0]) == (one[1] > two[1]))
        for group in by_prompt.values()
        for one, two in combinations(group, 2)
        if one[0] != two[0]
    ]
    return Agreement(len(known), spearman, sum(credits) / len(credits) if credits else None, len(credits))


@dataclass(frozen=True)
class LengthDependence:
    """Rank correlations that tell whether a judge goes by more than length; None where one side is constant.

    `label`: of length with people's labels. `score`: of length with the judge's scores. `partial`: of scores with labels once
    the ranks of length are taken out of both (the partial Spearman correlation); 0 for a judge that only measures length.
    """

    label: float | None
    score: float | None
    partial: float | None


def length_dependence(
    lengths: Sequence[int], labels: Sequence[float], scores: Sequence[float | None]
) -> LengthDependence:
    """How far `scores` follow the length of the response; responses without a score are left out."""
    known = [item for item in zip(lengths, labels, scores, strict=True) if item[2] is not None]
    columns = [[row[index] for row in known] for index in range(3)]
    if len(known) < 4 or any(len(set(column)) == 1 for column in columns):
        return LengthDependence(None, None, None)
    table = stats.spearmanr(list(zip(*columns, strict=True))).statistic
    label, score, both = float(table[0, 1]), float(table[0, 2]), float(table[1, 2])
    rest = (1 - label**2) * (1 - score**2)
    return LengthDependence(label, score, (both - label * score) / rest**0.5 if rest > 1e-12 else None)
