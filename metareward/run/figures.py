"""What a stage's lines say in numbers: the figures of the summary, of the collapse guard and of the report.

Lines in, numbers out; how they are shown is the business of who shows them. A figure is None where nothing was there to measure.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metareward.preference.battle import Verdict, consistent_only
from metareward.preference.bias import (
    ScoredVerdict,
    higher_score_preference,
    position_preference,
    position_preference_at_equal_scores,
    score_entropy,
)
from metareward.preference.caps import score_class
from metareward.run.jsonl import Line

SCORES = range(6)
"""The classes of the judge's scale; see `score_class`."""

Key = tuple[str, int]
"""(prompt_id, response_id)"""


@dataclass(frozen=True)
class ResponseFigures:
    """Of responses.jsonl. `length_mean` in characters, over all responses."""

    responses: int
    unfinished: int
    duplicates: int
    length_mean: float | None


@dataclass(frozen=True)
class JudgmentFigures:
    """Of judgments.jsonl. Lengths in characters; `histogram` counts the readable scores by class 0 to 5; `entropy` of it in nats.

    `tie_rate`: share of prompts whose best and worst mean score are equal, among the `prompts_compared` with two or more scored
    responses. `spread`: standard deviation of the scores of one response, averaged over the responses with two or more of them;
    0 where the judge always agrees with itself.
    """

    judgments: int
    readable: int
    length_mean: float | None
    score_mean: float | None
    histogram: tuple[int, ...]
    entropy: float | None
    tie_rate: float | None
    prompts_compared: int
    spread: float | None

    @property
    def parse_rate(self) -> float | None:
        return self.readable / self.judgments if self.judgments else None


@dataclass(frozen=True)
class ComparisonFigures:
    """Of comparisons.jsonl: see `preference.bias` for the three preferences. `decided` have a winner, `unequal` of these compare
    judgments with different scores."""

    comparisons: int
    decided: int
    unequal: int
    first_preference: float | None
    first_preference_at_equal_scores: float | None
    higher_score_preference: float | None


def response_figures(responses: Iterable[Line]) -> ResponseFigures:
    lines = list(responses)
    return ResponseFigures(
        len(lines),
        sum(not line["finished"] for line in lines),
        sum(line["duplicate_of"] is not None for line in lines),
        mean([len(line["text"]) for line in lines]),
    )


def judgment_figures(judgments: Iterable[Line]) -> JudgmentFigures:
    lines = list(judgments)
    by_response = scores_by_response(lines)
    scores = [score for found in by_response.values() for score in found]
    histogram = [0] * len(SCORES)
    for score in scores:
        histogram[score_class(score)] += 1
    means: dict[str, list[float]] = defaultdict(list)
    for (prompt_id, _), found in by_response.items():
        means[prompt_id].append(sum(found) / len(found))
    several = [values for values in means.values() if len(values) >= 2]
    ties = sum(max(values) - min(values) < 1e-9 for values in several)
    return JudgmentFigures(
        judgments=len(lines),
        readable=len(scores),
        length_mean=mean([len(line["text"]) for line in lines]),
        score_mean=mean(scores),
        histogram=tuple(histogram),
        entropy=score_entropy({float(score): histogram[score] for score in SCORES}),
        tie_rate=ties / len(several) if several else None,
        prompts_compared=len(several),
        spread=mean([deviation(found) for found in by_response.values() if len(found) >= 2]),
    )


def comparison_figures(comparisons: Iterable[Line], judgments: Iterable[Line]) -> ComparisonFigures:
    scores = {
        (line["prompt_id"], line["response_id"], line["judgment_id"]): line["score"] for line in judgments
    }
    verdicts = [scored_verdict(line, scores) for line in comparisons]
    decided = [verdict for verdict in verdicts if verdict.winner is not None]
    return ComparisonFigures(
        comparisons=len(verdicts),
        decided=len(decided),
        unequal=sum(verdict.first_score != verdict.second_score for verdict in decided),
        first_preference=position_preference(verdicts),
        first_preference_at_equal_scores=position_preference_at_equal_scores(verdicts),
        higher_score_preference=higher_score_preference(verdicts),
    )


def scored_verdict(line: Line, scores: dict[tuple[str, int, int], float]) -> ScoredVerdict:
    key = (line["prompt_id"], line["response_id"])
    return ScoredVerdict(line["winner"], scores[*key, line["first"]], scores[*key, line["second"]])


def scores_by_response(judgments: Iterable[Line]) -> dict[Key, list[float]]:
    """The readable scores of every response that has one, in the order of the judgments."""
    found: dict[Key, list[float]] = defaultdict(list)
    for line in judgments:
        if line["score"] is not None:
            found[line["prompt_id"], line["response_id"]].append(line["score"])
    return found


def verdicts_of(comparisons: Iterable[Line], consistent: bool) -> dict[Key, list[Verdict]]:
    """Verdicts by response; with `consistent`, only those that name the same judgment in both orders."""
    found: dict[Key, list[Verdict]] = defaultdict(list)
    for line in comparisons:
        found[line["prompt_id"], line["response_id"]].append(
            Verdict(line["first"], line["second"], line["winner"])
        )
    return {key: consistent_only(verdicts) for key, verdicts in found.items()} if consistent else found


def mean(values: Sequence[float] | Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a whole population (divided by the number of values)."""
    centre = sum(values) / len(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / len(values))
