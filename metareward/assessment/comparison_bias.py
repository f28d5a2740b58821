"""Biases of a meta-judge over sampled comparisons, with intervals; the figures are those of `preference.bias`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metareward.assessment.interval import Estimate, Resampling, estimate_ratio
from metareward.preference.bias import ScoredVerdict


@dataclass(frozen=True)
class Comparison:
    """One comparison of two judgments of a response. `pair` names the two judgments whatever their order."""

    prompt_id: str
    pair: str
    verdict: ScoredVerdict
    reversed: bool
    """Whether this is the second order of the pair."""


@dataclass(frozen=True)
class ComparisonBias:
    """`readable`: share of comparisons with a winner. The preferences are shares of readable comparisons: won by the judgment shown
    first (1/2 is unbiased), over all, over those with equal and over those with unequal scores; won by the higher score, over
    unequal ones. `consistent`: share of pairs read in both orders in which the same judgment won both times."""

    comparisons: int
    equal_scores: int
    readable: Estimate
    position: Estimate
    position_equal: Estimate
    position_unequal: Estimate
    higher_score: Estimate
    consistent: Estimate


def comparison_bias(comparisons: Sequence[Comparison], resampling: Resampling) -> ComparisonBias:
    """The figures of these comparisons; intervals draw whole prompts."""
    ids = [item.prompt_id for item in comparisons]
    verdicts = [item.verdict for item in comparisons]

    def share(
        wins: Callable[[ScoredVerdict], bool], among: Callable[[ScoredVerdict], bool] = lambda verdict: True
    ) -> Estimate:
        counted = [float(item.winner is not None and among(item)) for item in verdicts]
        won = [one * float(wins(item)) if one else 0.0 for one, item in zip(counted, verdicts, strict=True)]
        return estimate_ratio(won, counted, ids, resampling)

    return ComparisonBias(
        comparisons=len(comparisons),
        equal_scores=sum(equal(item) for item in verdicts),
        readable=estimate_ratio(
            [float(item.winner is not None) for item in verdicts], [1.0] * len(verdicts), ids, resampling
        ),
        position=share(first_won),
        position_equal=share(first_won, equal),
        position_unequal=share(first_won, lambda verdict: not equal(verdict)),
        higher_score=share(higher_won, lambda verdict: not equal(verdict)),
        consistent=consistency(comparisons, resampling),
    )


def equal(verdict: ScoredVerdict) -> bool:
    return verdict.first_score == verdict.second_score


def first_won(verdict: ScoredVerdict) -> bool:
    return verdict.winner == "first"


def higher_won(verdict: ScoredVerdict) -> bool:
    return first_won(verdict) == (verdict.first_score > verdict.second_score)


def consistency(comparisons: Sequence[Comparison], resampling: Resampling) -> Estimate:
    """Share of pairs with a winner in both orders that name the same judgment twice."""
    pairs: dict[tuple[str, str], dict[bool, Comparison]] = defaultdict(dict)
    for item in comparisons:
        if item.verdict.winner is not None:
            pairs[item.prompt_id, item.pair][item.reversed] = item
    both = [(key[0], found) for key, found in pairs.items() if len(found) == 2]
    same = [float(first_won(found[False].verdict) != first_won(found[True].verdict)) for _, found in both]
    return estimate_ratio(same, [1.0] * len(same), [prompt_id for prompt_id, _ in both], resampling)
